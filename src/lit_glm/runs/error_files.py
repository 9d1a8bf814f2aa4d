"""Error files in the run folder, one per rank: the reason in the first line, the traceback below."""

import logging
import os
import signal
import traceback
from pathlib import Path
from typing import List, Optional

from lit_glm.errors import InputError

log = logging.getLogger(__name__)

_FOLDER = "errors"
_KILLED = "killed-"
_ELSEWHERE = "error_folder"
"""File in the temporary folder of a secondary node that names the folder of its errors after the rendezvous."""


def error_reason(error: BaseException) -> str:
    """Return the text of an error for result.json."""
    summary = getattr(error, "summary", "")
    if summary:
        return str(summary)
    text = str(error).strip()
    return text if hasattr(error, "exit_status") and text else f"{type(error).__name__}: {text}"


def set_error_folder(spec_dir: Path, folder: Path) -> None:
    """Redirect the error files of this node's ranks to a folder below the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (spec_dir / _ELSEWHERE).write_text(str(folder), encoding="utf-8")


def error_folder(spec_dir: Path) -> Path:
    """Return the folder for the error files of a node's ranks."""
    try:
        return Path((spec_dir / _ELSEWHERE).read_text(encoding="utf-8"))
    except OSError:
        return spec_dir


def write_error_file(folder: Path, rank: int, error: BaseException) -> None:
    """Write the error file of a rank; a failed write is ignored, so that it does not hide the error."""
    calls = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        (folder / _FOLDER).mkdir(exist_ok=True)
        who = f"rank {rank}: " if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(error, InputError) else ""
        note = folder / _FOLDER / f"rank-{rank}.txt"
        note.write_text(f"{who}{error_reason(error)}\n\n{calls}", encoding="utf-8")
    except OSError:
        pass


def report_killed_rank(folder: Path, rank: int, number: int) -> int:
    """Report a rank that a signal has killed: on stderr, and in the error file that the rank could not write.

    Args:
        folder: folder of the job's errors.
        rank: the rank.
        number: number of the signal.

    Returns:
        The exit status of such a job.
    """
    name = signal.Signals(number).name
    log.error(f"rank {rank} was killed by {name}")
    if number in (signal.SIGTERM, signal.SIGABRT):  # these are consequences of other ranks' errors
        return 1
    try:
        (folder / _FOLDER).mkdir(exist_ok=True)
        (folder / _FOLDER / f"{_KILLED}{rank}.txt").write_text(f"rank {rank} was killed by {name}\n", encoding="utf-8")
    except OSError:
        pass
    return 1


def clear_error_files(folder: Path) -> None:
    """Delete the error files of an earlier attempt."""
    for note in _error_files(folder):
        note.unlink()


def root_cause(folder: Path) -> Optional[str]:
    """Return the root cause: a killed rank if there is one, else the earliest error; None without any."""
    notes = sorted(_error_files(folder), key=lambda note: (not note.name.startswith(_KILLED), note.stat().st_mtime))
    for note in notes:
        text = note.read_text(encoding="utf-8", errors="replace").split("\n\nTraceback", 1)[0].strip()
        if text:
            return text
    return None


def _error_files(folder: Path) -> List[Path]:
    return [*(folder / _FOLDER).glob("*-*.txt"), *folder.glob(f"nodes/*/{_FOLDER}/*-*.txt")]
