"""Signs of life: each node's first rank touches a file at every step; whoever waits for it watches the file's age."""

import os
import threading
import time
from pathlib import Path
from typing import Callable

FILE = "heartbeat"
_EVERY_S = 1.0


class Heartbeat:
    """Touches a file, at most once a second, so that it may be called at every step and every batch."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._next = 0.0

    def __call__(self) -> None:
        """Touch the file, if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_S
            self._path.touch()


def silent_for(folder: Path, since: float) -> float:
    """Seconds without a sign of life in `folder`; the ranks were started at `since` (`time.time()`)."""
    try:
        since = max(since, (folder / FILE).stat().st_mtime)
    except OSError:
        pass  # none yet
    return time.time() - since


def watch_this_process(folder: Path, limit_s: float, on_stall: Callable[[], None]) -> Callable[[], None]:
    """End this process when its work makes no progress: a thread that still runs while the work hangs.

    Args:
        folder: where the work beats.
        limit_s: seconds without a sign of life.
        on_stall: says so; then the process ends with status 1.

    Returns:
        Ends the watch.
    """
    over, begun = threading.Event(), time.time()

    def watch() -> None:
        while not over.wait(min(1.0, limit_s / 4)):
            if silent_for(folder, begun) > limit_s:
                on_stall()
                os._exit(1)

    threading.Thread(target=watch, name="stall watch", daemon=True).start()
    return over.set
