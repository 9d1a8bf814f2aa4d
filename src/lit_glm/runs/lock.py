"""One process at a time in a folder: whoever is at work there holds its lock."""

import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from lit_glm.atomic_files import make_folder, try_lock
from lit_glm.errors import InputError

_PROBE_S = 1.0  # somebody who only asks holds the lock for an instant
LOCK_FILE = ".lock"
"""In a folder, locked as long as somebody is at work there; says who."""


@contextmanager
def lock_directory(folder: Path, advice: str = "wait for its end, or give another hydra.run.dir=") -> Iterator[int]:
    """Keep a folder for this process, and for those that inherit the descriptor that it yields.

    Args:
        folder: made if it is not there.
        advice: what to do if another process is at work in it.

    Raises:
        InputError: then.
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
                raise InputError(f"{folder}: another process{f' ({who})' if who else ''} is at work here; {advice}")
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {platform.node()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def is_running(folder: Path) -> bool:
    """Whether a process is at work in a folder; True where that cannot be told, as in a folder of another user's."""
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
