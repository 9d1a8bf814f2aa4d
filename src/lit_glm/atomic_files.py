"""Atomic replacement of files, JSON and CSV files, and file locks."""

import csv
import errno
import fcntl
import json
import os
import platform
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from lit_glm.errors import InputError


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which is then renamed to `path` atomically, or deleted after an error.

    Args:
        path: the final path.
        durable: flush the file and its name to the disk, so that both survive a power loss.
    """
    # One name per writer: ranks with the same name would overwrite each other's partial file.
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
    """Create a folder that the user has named.

    Raises:
        InputError: if it cannot be created; ends with the advice `instead`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be created ({error.strerror}); {instead}") from error


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text file atomically."""
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Dict[str, Any], durable: bool = False) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", durable)


def read_json(path: Path) -> Optional[Dict[str, Any]]:
    """Read a JSON object; None if the file is missing, damaged, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_csv_rows(path: Path, columns: Sequence[str] = ()) -> List[Dict[str, str]]:
    """Read the complete rows of a table; a last line without a line feed was cut off when its writer was killed."""
    text = path.read_text(encoding="utf-8", errors="replace")
    # A power loss can leave lines with NUL bytes, on which the csv module of Python 3.8 raises.
    complete = [line for line in text[: text.rfind("\n") + 1].splitlines() if "\0" not in line]
    rows: List[Dict[str, str]] = []
    with suppress(csv.Error):  # a field is too long: the rows before it are kept
        rows.extend(row for row in csv.DictReader(complete) if None not in row and None not in row.values())
    return [row for row in rows if set(columns) <= set(row)]


def try_lock(descriptor: int) -> bool:
    """Try to lock an open file; False if another process holds the lock, True also on file systems without locks.

    Uses flock: the kernel releases it however a process ends. filelock 3.16 (the last version for Python 3.8) treats a
    file system without locks as a lock that is never free.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file inside the block; waits until it is free.

    Raises:
        OSError: if the file cannot be created.
    """
    descriptor = os.open(str(file), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not try_lock(descriptor):
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
