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

from lit_glm.errors import InputError


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary name to write to; what was written there gets the real one in one step, or is gone after an error.

    Args:
        path: the real name.
        durable: flush the file and its name to the disk, so that both survive a loss of power.
    """
    # A name of its own for each writer: two ranks that share one would read each other's half.
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, instead: str = "give another hydra.run.dir=") -> None:
    """Make a folder that the user has named.

    Raises:
        InputError: if it cannot be made; says what to do `instead`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be made ({error.strerror}); {instead}") from error


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a file that is at any moment either the old one or the new one."""
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Dict[str, Any], durable: bool = False) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", durable)


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
