"""Heartbeats of the ranks, and the watchdog that detects ranks without one and reports where they are.

Each rank touches a file of its own at every step and dumps its stack on request (a real-time signal). The watchdog is
used by a run in this process, by the supervisor of ranks, and by each rank under a torchrun started by the user; the
caller decides how the job ends.
"""

import faulthandler
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence

import psutil

from lit_glm.config.schema import TrainConfig

_FOLDER = "ranks"
_EVERY_S = 1.0
_ANSWER_S = 2.0
_ROUNDING_S = 2.0  # a process's start is known to a second
_FRAMES = 8
_ASK = signal.SIGRTMIN + 2
"""Asks for a stack; not one of the signals that stop, nor one that a library is known to take."""


def _stack_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.stack")


class Heartbeat:
    """Touches a file, at most once a second, so that it may be called at every step and every batch.

    The first call is the first sign: until then a rank imports and waits for the others to join, and can only be asked.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / _FOLDER / str(rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = _stack_of(self._path).open("w")
        # Python writes the stack from within the handler: also while a collective never returns.
        faulthandler.unregister(_ASK)  # of an earlier run in this process
        faulthandler.register(_ASK, self._stack, all_threads=False)
        self._path.write_text(str(os.getpid()))
        os.utime(self._path, (0, 0))
        self._next = 0.0

    def __call__(self) -> None:
        """Touch the file, if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_S
            self._path.touch()


def clear_heartbeats(folder: Path) -> None:
    """Forget the ranks of an earlier job."""
    for file in (folder / _FOLDER).glob("*"):
        file.unlink()


def last_heartbeat(folder: Path, ranks: Sequence[int]) -> float:
    """When the last sign was given, seconds since the epoch; 0 if none was."""
    signs = [0.0]
    for rank in ranks:
        try:
            signs.append((folder / _FOLDER / str(rank)).stat().st_mtime)
        except OSError:
            pass  # none yet
    return max(signs)


def collect_stack_traces(folder: Path, ranks: Sequence[int]) -> List[str]:
    """What these ranks of this machine are doing: lines for the person who asks which of them hangs."""
    said: List[str] = []
    asked: Dict[int, int] = {}
    for rank in ranks:
        file = folder / _FOLDER / str(rank)
        try:
            process = psutil.Process(int(file.read_text()))
            if process.create_time() > _stack_of(file).stat().st_mtime + _ROUNDING_S:
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
        stacks.setdefault(_read_stack_dump(_stack_of(folder / _FOLDER / str(rank)), size, limit), []).append(rank)
    for stack, where in stacks.items():
        name = f"rank{'s' * (len(where) > 1)} {', '.join(map(str, where))}"
        said.append(f"{name}, innermost call first:\n{stack}" if stack else f"{name} does not answer")
    return said


def _read_stack_dump(file: Path, size: int, limit: float) -> str:
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


STALL_MARGIN_S = 10.0
"""Seconds beyond `run.stall_timeout_s` without a sign of life until a job is ended."""
_ASLEEP_S = 10.0


class StallWatchdog:
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

    def seconds_since_heartbeat(self) -> float:
        """Since the newest sign; asked every second or so: after a longer pause (Ctrl-Z, a suspended machine) anew."""
        now = time.time()
        if now - self._asked > _ASLEEP_S:
            self._since = now
        self._asked = now
        return now - max(self._since, last_heartbeat(self._folder, self._ranks))

    def stalled_ranks(self) -> List[str]:
        """Whereabouts of the ranks if they have been silent for too long, and still are once that is known."""
        limit = self._limit if last_heartbeat(self._folder, self._ranks) else self._first
        if self.seconds_since_heartbeat() <= limit:
            return []
        where = collect_stack_traces(self._folder, self._ranks)
        return where if self.seconds_since_heartbeat() > limit else []


@contextmanager
def run_watchdog(watch: StallWatchdog, on_silence: Callable[[List[str]], None]) -> Iterator[None]:
    """Look once a second while the work inside goes on, in a thread that runs while the work hangs.

    Args:
        watch: what to look at.
        on_silence: gets the whereabouts, once; it decides how the work ends.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            where = watch.stalled_ranks()
            if where and not over.is_set():
                on_silence(where)
                return

    threading.Thread(target=look, name="stall watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def stall_message(config: TrainConfig, run_dir: Path, where: Sequence[str]) -> str:
    """What is said of a job that made no progress: where its ranks were."""
    limit = config.run.stall_timeout_s
    return "\n".join([f"no progress for {limit:g} s (run.stall_timeout_s): the job was ended ({run_dir})", *where])
