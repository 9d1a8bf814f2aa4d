"""How the first node of a search tells the others what to try: files in a folder that all of them see."""

import json
import time
from pathlib import Path
from typing import Iterator, Optional, Tuple

from lit_glm.atomic_files import write_json
from lit_glm.errors import RunError

_FOLDER = "orders"
_LOOK_S = 0.2


class TrialQueue:
    """Of one start of a search: a folder of its own, so that nobody acts on those of an earlier one."""

    def __init__(self, folder: Path) -> None:
        """Begin; an earlier start that was killed is said to be over.

        Args:
            folder: the search's.
        """
        place = folder / _FOLDER
        place.mkdir(parents=True, exist_ok=True)
        for before in place.iterdir():
            write_json(before / "9999.json", {"bs": None})
        self._place = place / f"{time.time_ns():020}"
        self._place.mkdir()
        self._given = 0

    def put(self, bs: Optional[int], folder: str) -> None:
        """Order a try; None: there are no more."""
        write_json(self._place / f"{self._given:04}.json", {"bs": bs, "folder": folder})
        self._given += 1


def iter_trials(folder: Path, patience_s: float) -> Iterator[Tuple[int, str]]:
    """The tries of the newest start that is not over, as they are ordered: batch size and folder of each.

    Args:
        folder: the search's.
        patience_s: how long the next one is waited for.

    Raises:
        RunError: if none comes.
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
        f"node 0 began no try for {patience_s:.0f} s (looked in {folder / _FOLDER}: is it a folder that all nodes see?)"
    )


def _is_finished(start: Path) -> bool:
    files = sorted(start.glob("*.json"))
    return bool(files) and json.loads(files[-1].read_text(encoding="utf-8"))["bs"] is None
