"""The watch over silence: who gives no sign of life and where that is. What follows is for whoever asked.

One for all: a run in this process, the launcher of ranks, and each rank under a torchrun of the user's.
"""

import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Sequence

from lit_glm.config.schema import TrainConfig
from lit_glm.jobs import signs

STALL_MARGIN_S = 10.0
"""Seconds beyond `run.stall_timeout_s` without a sign of life until a job is ended."""
_ASLEEP_S = 10.0


class Watch:
    """How long the ranks of this machine have given no sign of life, while whoever asks was awake himself."""

    def __init__(self, folder: Path, ranks: Sequence[int], limit_s: float, before_first_s: float = 0.0) -> None:
        """Begin to count.

        Args:
            folder: where the ranks give signs.
            ranks: of this machine.
            limit_s: how long all of them may be silent.
            before_first_s: the same before the first sign, if that is longer: nodes are still meeting, ranks joining.
        """
        self._folder, self._ranks = folder, ranks
        self._limit, self._first = limit_s, max(limit_s, before_first_s)
        self._since = self._asked = time.time()

    def seconds(self) -> float:
        """Since the newest sign; asked every second or so: after a longer pause (Ctrl-Z, a suspended machine) anew."""
        now = time.time()
        if now - self._asked > _ASLEEP_S:
            self._since = now
        self._asked = now
        return now - max(self._since, signs.newest(self._folder, self._ranks))

    def silent(self) -> List[str]:
        """Whereabouts of the ranks if they have been silent for too long, and still are once that is known."""
        limit = self._limit if signs.newest(self._folder, self._ranks) else self._first
        if self.seconds() <= limit:
            return []
        where = signs.whereabouts(self._folder, self._ranks)
        return where if self.seconds() > limit else []


@contextmanager
def watching(watch: Watch, on_silence: Callable[[List[str]], None]) -> Iterator[None]:
    """Look once a second while the work inside goes on, in a thread that runs while the work hangs.

    Args:
        watch: what to look at.
        on_silence: gets the whereabouts, once; it decides how the work ends.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            where = watch.silent()
            if where and not over.is_set():
                on_silence(where)
                return

    threading.Thread(target=look, name="stall watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def said_of(config: TrainConfig, run_dir: Path, where: Sequence[str]) -> str:
    """What is said of a job that made no progress: where its ranks were."""
    limit = config.run.stall_timeout_s
    return "\n".join([f"no progress for {limit:g} s (run.stall_timeout_s): the job was ended ({run_dir})", *where])
