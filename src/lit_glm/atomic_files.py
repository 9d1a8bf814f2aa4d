"""Files that are whole at any moment, and one process at a time at making one."""

import errno
import fcntl
import json
import os
import platform
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what was written there gets the real one in one step, or is gone after an error."""
    # A name of its own for each writer: two ranks that share one would read each other's half.
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file that is at any moment either the old one or the new one."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Dict[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def try_lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has it, True too where the file system has no locks.

    The kernel's own locks (flock): it lets go of them however a process ends. A library for them (filelock 3.16, the
    last for Python 3.8) takes a file system that has none for a lock that is never free.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Wait until nobody else is inside for the same file.

    Raises:
        OSError: if the file cannot be made.
    """
    descriptor = os.open(str(file), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not try_lock(descriptor):
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
