"""Signs of life: each rank touches a file of its own at every step, and leaves there what it was doing when asked."""

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import psutil

STALL_MARGIN_S = 10.0
"""Seconds beyond `run.stall_timeout_s` without a sign of life until a job is ended."""
_FOLDER = "heartbeat"
_EVERY_S = 1.0
_ANSWER_S = 2.0
_FRAMES = 8
_ASK = signal.SIGUSR1


class Heartbeat:
    """Touches a file, at most once a second, so that it may be called at every step and every batch."""

    def __init__(self, folder: Path, rank: int) -> None:
        (folder / _FOLDER).mkdir(exist_ok=True)
        self._file = (folder / _FOLDER / str(rank)).open("w")
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        # Python writes the stack from within the signal handler: also while a collective never returns.
        faulthandler.register(_ASK, self._file, all_threads=False)
        self._next = 0.0

    def __call__(self) -> None:
        """Touch the file, if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_S
            os.utime(self._file.fileno())


def clear(folder: Path) -> None:
    """Forget the ranks of an earlier job."""
    for file in (folder / _FOLDER).glob("*"):
        file.unlink()


def silent_for(folder: Path, ranks: Sequence[int], since: float) -> float:
    """Seconds without a sign of life of any of these ranks; they were started at `since` (`time.time()`)."""
    for rank in ranks:
        try:
            since = max(since, (folder / _FOLDER / str(rank)).stat().st_mtime)
        except OSError:
            pass  # none yet
    return time.time() - since


def whereabouts(folder: Path, ranks: Sequence[int]) -> List[str]:
    """What these ranks of this machine are doing: lines for the person who asks which of them hangs."""
    said: List[str] = []
    asked: Dict[int, int] = {}
    for rank in ranks:
        file = folder / _FOLDER / str(rank)
        try:
            process = psutil.Process(int(file.read_text().split("\n", 1)[0]))
            if process.create_time() > file.stat().st_mtime:
                raise psutil.NoSuchProcess(process.pid)  # its number is another process's by now
            if process.status() == psutil.STATUS_STOPPED:
                said.append(f"rank {rank} (process {process.pid}) is stopped (SIGSTOP)")
                continue
            asked[rank] = file.stat().st_size
            process.send_signal(_ASK)
        except (OSError, ValueError):
            said.append(f"rank {rank} has given no sign of life")
        except psutil.Error:
            said.append(f"rank {rank} is gone")
    limit = time.monotonic() + _ANSWER_S
    files = {rank: folder / _FOLDER / str(rank) for rank in asked}
    while any(files[rank].stat().st_size == size for rank, size in asked.items()) and time.monotonic() < limit:
        time.sleep(0.05)
    stacks: Dict[str, List[int]] = {}
    for rank, file in files.items():
        frames = [line for line in file.read_text()[asked[rank] :].splitlines() if line.startswith("  File ")]
        stacks.setdefault("\n".join(frames[:_FRAMES]), []).append(rank)
    for stack, where in stacks.items():
        name = f"rank{'s' * (len(where) > 1)} {', '.join(map(str, where))}"
        said.append(f"{name}, innermost call first:\n{stack}" if stack else f"{name} does not answer")
    return said


def stalled(limit_s: float, run_dir: Path, where: Sequence[str]) -> str:
    """What is said of a job that made no progress: where its ranks were."""
    return "\n".join([f"no progress for {limit_s:g} s (run.stall_timeout_s): the job was ended ({run_dir})", *where])


def watch_this_process(
    folder: Path, ranks: Sequence[int], limit_s: float, on_stall: Callable[[List[str]], None]
) -> Callable[[], None]:
    """End this process when its work makes no progress: a thread that still runs while the work hangs.

    Args:
        folder: where the work beats.
        ranks: of this machine.
        limit_s: seconds without a sign of life.
        on_stall: gets their whereabouts and says so; then the process ends with status 1.

    Returns:
        Ends the watch.
    """
    over, begun = threading.Event(), time.time()

    def watch() -> None:
        while not over.wait(min(1.0, limit_s / 4)):
            if silent_for(folder, ranks, begun) > limit_s:
                on_stall(whereabouts(folder, ranks))
                os._exit(1)

    threading.Thread(target=watch, name="stall watch", daemon=True).start()
    return over.set
