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
_DUMP_TIMEOUT_S = 2.0
_ROUNDING_S = 2.0  # start times of processes have a resolution of one second
_FRAMES = 8
_DUMP_SIGNAL = signal.SIGRTMIN + 2
"""Signal that requests a stack dump; not a stop signal, nor one that a known library uses."""


def _stack_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.stack")


class Heartbeat:
    """Heartbeat of a rank: touches a file at most once a second, so that it may be called at every step and batch.

    The first call is the first heartbeat. Before it, a rank imports and joins the others, but can dump its stack.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / _FOLDER / str(rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = _stack_of(self._path).open("w")
        # faulthandler writes the stack inside the signal handler, so it works while a collective hangs.
        faulthandler.unregister(_DUMP_SIGNAL)  # handler of an earlier run in this process
        faulthandler.register(_DUMP_SIGNAL, self._stack, all_threads=False)
        self._path.write_text(str(os.getpid()))
        os.utime(self._path, (0, 0))
        self._next = 0.0

    def __call__(self) -> None:
        """Touch the file, unless that was done less than a second ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_S
            self._path.touch()


def clear_heartbeats(folder: Path) -> None:
    """Delete the heartbeat files of an earlier job."""
    for file in (folder / _FOLDER).glob("*"):
        if file.name.partition(".stack")[0].isdecimal() and file.is_file():  # others are not ours
            file.unlink()


def last_heartbeat(folder: Path, ranks: Sequence[int]) -> float:
    """Return the time of the newest heartbeat in seconds since the epoch; 0 if there is none."""
    files = [folder / _FOLDER / str(rank) for rank in ranks]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def collect_stack_traces(folder: Path, ranks: Sequence[int]) -> List[str]:
    """Return the stack or the state of each of these local ranks, as text that shows which one hangs."""
    lines: List[str] = []
    sizes: Dict[int, int] = {}
    for rank in ranks:
        file = folder / _FOLDER / str(rank)
        try:
            process = psutil.Process(int(file.read_text()))
            if process.create_time() > _stack_of(file).stat().st_mtime + _ROUNDING_S:
                raise psutil.NoSuchProcess(process.pid)  # the PID has been reused
            if process.status() == psutil.STATUS_STOPPED:
                lines.append(f"rank {rank} (process {process.pid}) is stopped (SIGSTOP)")
                continue
            sizes[rank] = _stack_of(file).stat().st_size
            process.send_signal(_DUMP_SIGNAL)
        except (OSError, ValueError):
            lines.append(f"rank {rank} has not started")
        except psutil.Error:
            lines.append(f"rank {rank} has exited")
    limit = time.monotonic() + _DUMP_TIMEOUT_S
    stacks: Dict[str, List[int]] = {}
    for rank, size in sizes.items():
        stacks.setdefault(_read_stack_dump(_stack_of(folder / _FOLDER / str(rank)), size, limit), []).append(rank)
    for stack, ranks_there in stacks.items():
        name = f"rank{'s' * (len(ranks_there) > 1)} {', '.join(map(str, ranks_there))}"
        lines.append(f"{name}, innermost call first:\n{stack}" if stack else f"{name} does not respond")
    return lines


def _read_stack_dump(file: Path, size: int, limit: float) -> str:
    """Read the innermost frames that a rank writes after the first `size` bytes; empty on timeout."""
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
"""Seconds beyond `run.stall_timeout_s` without a heartbeat until a job is terminated."""
_SUSPENDED_S = 10.0


class StallWatchdog:
    """Stall detector for the ranks of this machine. Time while this process was suspended does not count."""

    def __init__(self, folder: Path, ranks: Sequence[int], limit_s: float, before_first_s: float = 0.0) -> None:
        """Start counting.

        Args:
            folder: folder with the heartbeats of the ranks.
            ranks: ranks of this machine.
            limit_s: maximum seconds without a heartbeat of any of them.
            before_first_s: the limit before the first heartbeat, if longer: ranks start and join the rendezvous.
        """
        self._folder, self._ranks = folder, ranks
        self._limit, self._first = limit_s, max(limit_s, before_first_s)
        self._since = self._last_check = time.time()

    def seconds_since_heartbeat(self) -> float:
        """Return the age of the newest heartbeat; restarts if not called for `_SUSPENDED_S` seconds (Ctrl-Z)."""
        now = time.time()
        if now - self._last_check > _SUSPENDED_S:
            self._since = now
        self._last_check = now
        return now - max(self._since, last_heartbeat(self._folder, self._ranks))

    def stalled_ranks(self) -> List[str]:
        """Return the stack traces of the ranks if there is no heartbeat within the limit, checked before and after."""
        limit = self._limit if last_heartbeat(self._folder, self._ranks) else self._first
        if self.seconds_since_heartbeat() <= limit:
            return []
        traces = collect_stack_traces(self._folder, self._ranks)
        return traces if self.seconds_since_heartbeat() > limit else []


@contextmanager
def run_watchdog(watchdog: StallWatchdog, on_stall: Callable[[List[str]], None]) -> Iterator[None]:
    """Check once a second for a stall of the work inside the block, in a thread that runs even if it hangs.

    Args:
        watchdog: the stall detector.
        on_stall: called once with the stack traces; decides how the work ends.
    """
    over = threading.Event()

    def check() -> None:
        while not over.wait(1.0):
            stalled = watchdog.stalled_ranks()
            if stalled and not over.is_set():
                on_stall(stalled)
                return

    threading.Thread(target=check, name="stall watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def stall_message(config: TrainConfig, run_dir: Path, traces: Sequence[str]) -> str:
    """Return the error message of a job without progress, with the stack traces of its ranks."""
    limit = config.run.stall_timeout_s
    return "\n".join([f"no progress for {limit:g} s (run.stall_timeout_s): job terminated ({run_dir})", *traces])
