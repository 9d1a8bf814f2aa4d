"""Signs of life: each rank touches a file of its own at every step, and writes down where it is when it is asked."""

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import psutil

STALL_MARGIN_S = 10.0
"""Seconds beyond `run.stall_timeout_s` without a sign of life until a job is ended."""
_FOLDER = "ranks"
_EVERY_S = 1.0
_ANSWER_S = 2.0
_ASLEEP_S = 10.0
_ROUNDING_S = 2.0  # a process's start is known to a second
_FRAMES = 8
_ASK = signal.SIGUSR1


def _stack_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.stack")


class Heartbeat:
    """Touches a file, at most once a second, so that it may be called at every step and every batch."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / _FOLDER / str(rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Python writes the stack from within the signal handler: also while a collective never returns.
        faulthandler.register(_ASK, _stack_of(self._path).open("w"), all_threads=False)
        self._path.write_text(str(os.getpid()))
        self._next = 0.0

    def __call__(self) -> None:
        """Touch the file, if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_S
            self._path.touch()


def clear(folder: Path) -> None:
    """Forget the ranks of an earlier job."""
    for file in (folder / _FOLDER).glob("*"):
        file.unlink()


class Silence:
    """How long the ranks of this machine have given no sign of life, while whoever asks was awake himself."""

    def __init__(self, folder: Path, ranks: Sequence[int]) -> None:
        self._folder, self._ranks = folder, ranks
        self._files = [folder / _FOLDER / str(rank) for rank in ranks]
        self._since = self._asked = time.time()

    def seconds(self) -> float:
        """Since the newest sign; asked every second or so: after a longer pause (Ctrl-Z, a suspended machine) anew."""
        now = time.time()
        if now - self._asked > _ASLEEP_S:
            self._since = now
        self._asked = now
        return now - max([self._since, *self._signs()])

    def stall(self, limit_s: float) -> Optional[List[str]]:
        """Whereabouts of the ranks if they have been silent for too long, and still are once that is known."""
        if self.seconds() <= limit_s:
            return None
        where = whereabouts(self._folder, self._ranks)
        return where if self.seconds() > limit_s else None

    def begun(self) -> bool:
        """Whether a rank has given any sign yet."""
        return bool(self._signs())

    def _signs(self) -> List[float]:
        signs = []
        for file in self._files:
            try:
                signs.append(file.stat().st_mtime)
            except OSError:
                pass  # none yet
        return signs


def whereabouts(folder: Path, ranks: Sequence[int]) -> List[str]:
    """What these ranks of this machine are doing: lines for the person who asks which of them hangs."""
    said: List[str] = []
    asked: Dict[int, int] = {}
    for rank in ranks:
        file = folder / _FOLDER / str(rank)
        try:
            process = psutil.Process(int(file.read_text()))
            if process.create_time() > file.stat().st_mtime + _ROUNDING_S:
                raise psutil.NoSuchProcess(process.pid)  # its number is another process's by now
            if process.status() == psutil.STATUS_STOPPED:
                said.append(f"rank {rank} (process {process.pid}) is stopped (SIGSTOP)")
                continue
            asked[rank] = _stack_of(file).stat().st_size
            process.send_signal(_ASK)
        except (OSError, ValueError):
            said.append(f"rank {rank} has given no sign of life")
        except psutil.Error:
            said.append(f"rank {rank} is gone")
    limit = time.monotonic() + _ANSWER_S
    stacks: Dict[str, List[int]] = {}
    for rank, size in asked.items():
        stacks.setdefault(_answer(_stack_of(folder / _FOLDER / str(rank)), size, limit), []).append(rank)
    for stack, where in stacks.items():
        name = f"rank{'s' * (len(where) > 1)} {', '.join(map(str, where))}"
        said.append(f"{name}, innermost call first:\n{stack}" if stack else f"{name} does not answer")
    return said


def _answer(file: Path, size: int, limit: float) -> str:
    """The innermost calls that a rank has written behind the first `size` bytes; nothing if it does not in time."""
    while True:
        time.sleep(0.05)
        try:
            text = file.read_bytes()[size:].decode(errors="replace")
        except OSError:
            return ""
        frames = [line for line in text.splitlines() if line.startswith("  File ")]
        if len(frames) >= _FRAMES or (frames and "<module>" in text) or time.monotonic() > limit:
            return "\n".join(frames[:_FRAMES])


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
    over, silence = threading.Event(), Silence(folder, ranks)

    def watch() -> None:
        while not over.wait(min(1.0, limit_s / 4)):
            where = silence.stall(limit_s)
            if where is not None and not over.is_set():
                try:
                    on_stall(where)
                finally:
                    os._exit(1)

    threading.Thread(target=watch, name="stall watch", daemon=True).start()
    return over.set
