"""One process at a time: in a run folder, and at making a file that several runs share."""

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import filelock

from lit_glm.errors import InputError

_PROBE_S = 1.0  # somebody who only asks holds the lock for an instant
FILE = ".lock"
"""In a run folder, locked as long as the run lasts; the kernel lets go of it however the process ends."""


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until nobody else is inside for the same file; no lock where the file system has none."""
    lock = filelock.FileLock(str(file))
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield  # what is made inside is put in place by a rename: at worst it is made twice
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep a run folder for this process.

    Raises:
        InputError: if another process is at work in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(run_dir / FILE))
    try:
        lock.acquire(timeout=_PROBE_S)
    except filelock.Timeout:
        raise InputError(
            f"{run_dir}: another process runs in this folder; wait for its end, or choose another (hydra.run.dir)"
        ) from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()


def is_running(run_dir: Path) -> bool:
    """Whether a process is at work in a run folder."""
    if not (run_dir / FILE).exists():
        return False
    try:
        with filelock.FileLock(str(run_dir / FILE), timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
