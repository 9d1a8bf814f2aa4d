"""Process control: parent-death signal, limit of open files, termination, faster imports, out-of-memory errors."""

import ctypes
import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Optional

import psutil

from lit_glm.compat import postpone_compiler, without_plotting
from lit_glm.errors import RunError

if TYPE_CHECKING:
    from lit_glm.config.schema import TrainConfig

_MAX_OPEN_FILES = 65536
_LOADER_OPEN_FILES = 256
"""Minimum number of open files for loader workers and their rank; with fewer they deadlock silently."""


_LIBC = ctypes.CDLL(None)  # opened here: a child between fork and exec must not load a library


def set_parent_death_signal(number: int = signal.SIGKILL, parent: Optional[int] = None) -> None:
    """Make the kernel send this process a signal when its parent exits (Linux: prctl PR_SET_PDEATHSIG).

    Args:
        number: the signal; sent at once if the parent has already exited.
        parent: PID of the parent; None: the process that started this one with multiprocessing, if any.
    """
    try:
        _LIBC.prctl(1, int(number))
    except (AttributeError, OSError):  # not Linux
        pass
    if parent is None:
        starter = multiprocessing.parent_process()
        parent = os.getppid() if starter is None else starter.pid
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard one: loader workers send tensors as open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def check_open_files_limit(num_workers: int) -> None:
    """Check that a rank may open as many files as its loaders need.

    Args:
        num_workers: processes that load batches (data.num_workers).

    Raises:
        RunError: if not.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_workers > 0 and soft != resource.RLIM_INFINITY and soft < _LOADER_OPEN_FILES:
        raise RunError(
            f"a process may open {soft} files here (ulimit -Hn), but data.num_workers={num_workers} needs "
            f"{_LOADER_OPEN_FILES}: raise the limit, or use data.num_workers=0",
            f"open files are limited to {soft}",
        )


def kill_session(pid: int) -> None:
    """Kill all processes of the session that a process leads; the process itself may have exited."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def kill_children() -> None:
    """Kill all descendants of this process."""
    with suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


def exit_now(status: int) -> None:
    """Exit this process without the interpreter's teardown.

    After a failure, teardown may wait for a lost peer; after a success, threads of torch's collectives that are still
    joinable occasionally abort the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_MIN_MODULES_TO_FREEZE = 100
"""Minimum number of modules that a large library imports."""


@contextmanager
def paused_gc() -> Iterator[None]:
    """Disable the collector inside the block; freeze the existing objects afterwards if much was imported."""
    before, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before + _MIN_MODULES_TO_FREEZE:
            gc.freeze()
        if was_on:
            gc.enable()


@contextmanager
def fast_imports(config: "TrainConfig") -> Iterator[None]:
    """Import Lightning inside the block in less time (benchmarks/startup.py): without garbage collection and plotting.

    On the CPU, torch's compiler is not imported either, unless the run uses `torch.compile` or activation
    checkpointing, which both need it. On other devices it is, because this has not been tried on an accelerator, and a
    vendor's package may extend the compiler.

    Args:
        config: configuration of the run.
    """
    compiles = config.model.compile or config.model.activation_checkpointing
    if not compiles and (config.hardware.accelerator == "cpu" or config.hardware.runtime == "simulated"):
        postpone_compiler()
    with paused_gc(), without_plotting():
        yield


_OOM_PATTERN = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|not enough memory|bad_alloc|bad allocation|ALLOC_FAILED|"
    r"Unable to allocate|failed to allocate",
    re.IGNORECASE,
)


def is_oom_error(error: BaseException) -> bool:
    """Return whether an error means that a device or the machine is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and _OOM_PATTERN.search(str(error)) is not None


def oom_kill_count() -> int:
    """Return how many processes the kernel has OOM-killed so far, on this machine or in this container."""
    count = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            match = re.search(r"^oom_kill (\d+)$", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            continue
        count = max(count, int(match.group(1)) if match else 0)
    return count
