"""Exclusive lock of a folder, held by the process that works in it."""

import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from lit_glm.atomic_files import make_folder, try_lock
from lit_glm.errors import InputError

_PROBE_S = 1.0  # `is_running` holds the lock for an instant
LOCK_FILE = ".lock"
"""Lock file in the folder; contains the PID and host of the process that locked it."""


@contextmanager
def lock_directory(folder: Path, advice: str = "wait until it exits, or give another hydra.run.dir=") -> Iterator[int]:
    """Lock a folder for this process, and for those that inherit the yielded descriptor.

    Args:
        folder: the folder; created if missing.
        advice: what to do if another process holds the lock, for the message.

    Raises:
        InputError: if another process holds the lock, or the folder is not writable.
    """
    make_folder(folder)
    try:
        descriptor = os.open(str(folder / LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); give another hydra.run.dir=") from error
    try:
        end = time.monotonic() + _PROBE_S
        while not try_lock(descriptor):
            if time.monotonic() > end:
                who = os.read(descriptor, 200).decode(errors="replace").strip()
                raise InputError(f"{folder}: in use by another process{f' ({who})' if who else ''}; {advice}")
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {platform.node()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def is_running(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder; True if unknown, as in another user's folder."""
    try:
        descriptor = os.open(str(folder / LOCK_FILE), os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
