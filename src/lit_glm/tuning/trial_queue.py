"""File-based queue through which node 0 of a search sends the trials to the other nodes, in a shared folder."""

import json
import time
from pathlib import Path
from typing import Iterator, Optional, Tuple

from lit_glm.atomic_files import write_json
from lit_glm.errors import RunError

_FOLDER = "orders"
_LOOK_S = 0.2


class TrialQueue:
    """Queue of one start of a search. Each start has its own folder, so that trials of an earlier start are ignored."""

    def __init__(self, folder: Path) -> None:
        """Create the queue, and mark the queues of earlier starts as finished.

        Args:
            folder: folder of the search.
        """
        place = folder / _FOLDER
        place.mkdir(parents=True, exist_ok=True)
        for before in place.iterdir():
            write_json(before / "9999.json", {"bs": None})
        self._place = place / f"{time.time_ns():020}"
        self._place.mkdir()
        self._given = 0

    def put(self, bs: Optional[int], folder: str) -> None:
        """Enqueue a trial; None ends the queue."""
        write_json(self._place / f"{self._given:04}.json", {"bs": bs, "folder": folder})
        self._given += 1


def iter_trials(folder: Path, patience_s: float) -> Iterator[Tuple[int, str]]:
    """Yield batch size and folder of each trial of the newest unfinished start, in order.

    Args:
        folder: folder of the search.
        patience_s: seconds to wait for the next trial.

    Raises:
        RunError: if no trial is enqueued in time.
    """
    own: Optional[Path] = None
    number, until = 0, time.monotonic() + patience_s
    while time.monotonic() < until:
        if own is None:
            starts = sorted((folder / _FOLDER).glob("*")) if (folder / _FOLDER).is_dir() else []
            own = starts[-1] if starts and not _is_finished(starts[-1]) else None
        file = None if own is None else own / f"{number:04}.json"
        if file is None or not file.is_file():
            time.sleep(_LOOK_S)
            continue
        order = json.loads(file.read_text(encoding="utf-8"))
        if order["bs"] is None:
            return
        yield int(order["bs"]), str(order["folder"])
        number, until = number + 1, time.monotonic() + patience_s
    raise RunError(
        f"node 0 started no trial for {patience_s:.0f} s (searched in {folder / _FOLDER}: do all nodes share it?)"
    )


def _is_finished(start: Path) -> bool:
    files = sorted(start.glob("*.json"))
    return bool(files) and json.loads(files[-1].read_text(encoding="utf-8"))["bs"] is None
