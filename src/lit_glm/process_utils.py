"""How processes of a job end: with whoever started them, when they are told to, and without being held up."""

import ctypes
import os
import resource
import signal
import sys
from typing import List, Optional

import psutil

from lit_glm.errors import RunError

GRACE_S = 40.0
"""For a process that saves before it ends."""
_MOST_OPEN_FILES = 65536
_LOADER_OPEN_FILES = 256
"""That loaders' processes and their rank need at least; with fewer they wait for each other without a word."""


_LIBC = ctypes.CDLL(None)  # opened here: a child between fork and exec must not load a library


def set_parent_death_signal(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux: prctl PR_SET_PDEATHSIG)."""
    try:
        _LIBC.prctl(1, int(number))
    except (AttributeError, OSError):  # another system
        pass


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard one: loaders' processes hand over tensors as open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
            f"{_LOADER_OPEN_FILES}: raise the limit, or take data.num_workers=0",
            f"open files are limited to {soft}",
        )


def kill_session(pid: int) -> None:
    """End the session that a process has begun, at once; the process itself may be gone."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def terminate_tree(process: psutil.Process, grace_s: float, number: Optional[int] = signal.SIGTERM) -> None:
    """End a process and all that it has started: asked first, killed when the time is over.

    Args:
        process: the one that is asked, and passes it on.
        grace_s: how long it may take.
        number: the signal that asks; None: it has been asked already.
    """
    tree = [process, *_children(process)]
    try:
        if number is not None:
            process.send_signal(number)
        process.wait(timeout=grace_s)
    except psutil.Error:
        pass
    kill_processes([*tree, *_children(process)])


def kill_processes(processes: List[psutil.Process]) -> None:
    """End processes at once."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            pass


def kill_children() -> None:
    """End all that this process has started."""
    kill_processes(_children(psutil.Process()))


def _children(process: psutil.Process) -> List[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def exit_now(status: int) -> None:
    """End this rank without the interpreter's teardown.

    After a failure a peer that is gone must not hold this process up; after a success threads of torch's collectives
    that are still joinable would abort it now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
