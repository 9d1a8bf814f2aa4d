"""Functions that `test_isolated_process.py` calls in a child process, which imports nothing larger."""

import ctypes
import os

from lit_glm.errors import InputError
from lit_glm.isolated_process import ReportProgress


def adds(a: int, b: int, progress: ReportProgress) -> int:
    print("a library's word")  # is no answer
    progress(1, 2)
    return a + b


def process_id(_path: str, _progress: ReportProgress) -> int:
    return os.getpid()


def refuses(path: str, _progress: ReportProgress) -> None:
    raise InputError(f"{path}: no")


def raises_key_error(path: str, _progress: ReportProgress) -> None:
    raise KeyError("chalk")


def crashes(path: str, _progress: ReportProgress) -> None:
    ctypes.string_at(0)


def raises_disk_full(path: str, _progress: ReportProgress) -> None:
    raise OSError(28, "No space left on device")
