"""One process at a time: in a run folder, and at making a file that several runs share.

The kernel's own locks (flock): it lets go of them however a process ends. A library for them (filelock 3.16, the last
for Python 3.8) takes a file system that has none for a lock that is never free.
"""

import errno
import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from lit_glm.errors import InputError

_PROBE_S = 1.0  # somebody who only asks holds the lock for an instant
FILE = ".lock"
"""In a run folder, locked as long as the run lasts."""


def _take(descriptor: int) -> bool:
    """Lock an open file; False if another process has it, True too where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until nobody else is inside for the same file.

    Raises:
        OSError: if the file cannot be made.
    """
    descriptor = os.open(str(file), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _take(descriptor):
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[int]:
    """Keep a run folder for this process, and for those that inherit the descriptor that it yields.

    Raises:
        InputError: if another process is at work in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(str(run_dir / FILE), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + _PROBE_S
        while not _take(descriptor):
            if time.monotonic() > end:
                raise InputError(
                    f"{run_dir}: another process runs in this folder; wait for its end, or give another hydra.run.dir="
                )
            time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def is_running(run_dir: Path) -> bool:
    """Whether a process is at work in a run folder."""
    try:
        descriptor = os.open(str(run_dir / FILE), os.O_RDWR)
    except OSError:
        return False
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)
