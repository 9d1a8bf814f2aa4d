"""Checkpoints of a run: written atomically, pruned, and the newest valid one found for resuming."""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from lit_glm.atomic_files import atomic_write
from lit_glm.compat import load_torch_file
from lit_glm.errors import RunError, first_line

_KEEP = 2
_NAME = re.compile(r"step-(\d+)\.ckpt")


class _ErrorCapturingWriter:
    """File wrapper that stores the first error: torch 1.12 aborts on a failed write, newer versions hide the cause."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        """Write the data, unless an earlier write has failed."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: the owner of the file flushes it."""


def save(content: Dict[str, Any], target: Path) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, rename it.

    Raises:
        RunError: if it cannot be written; the partial file is deleted.
    """
    import torch

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, durable=True) as temporary, temporary.open("wb") as file:
            takes_all: Any = _ErrorCapturingWriter(file)
            torch.save(content, takes_all)
            if takes_all.error is not None:
                raise takes_all.error
    except OSError as error:
        raise RunError(
            f"{target}: the checkpoint cannot be written ({error}); measurements are saved; free disk space, "
            f"then resume with run.resume={target.parent.parent}"
        ) from error


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}.ckpt"


def list_checkpoints(run_dir: Path) -> List[Tuple[int, Path]]:
    """Return (step, path) of all checkpoints, newest first."""
    checkpoints = []
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        match = _NAME.fullmatch(path.name)
        if match:
            checkpoints.append((int(match.group(1)), path))
    return sorted(checkpoints, reverse=True)


def resume_hint(run_dir: Path) -> str:
    """Return which checkpoint an interrupted run can be resumed from, for messages."""
    checkpoints = list_checkpoints(run_dir)
    after = f"after step {checkpoints[0][0]}" if checkpoints else "from the start (no checkpoint was saved)"
    return f"resume {after} with run.resume={run_dir}"


def remove_partial(run_dir: Path) -> None:
    """Delete partial checkpoint files of ranks that were killed while they saved."""
    for part in (run_dir / "checkpoints").glob(".step-*.part"):
        try:
            part.unlink()
        except OSError:
            pass


def prune(run_dir: Path) -> None:
    """Delete all checkpoints but the newest `_KEEP`."""
    for _, path in list_checkpoints(run_dir)[_KEEP:]:
        path.unlink()


def latest_valid(run_dir: Path, config_hash: str) -> Tuple[Optional[Path], Dict[str, Any], List[str]]:
    """Find the newest checkpoint that can be read and belongs to this run.

    Args:
        run_dir: the run folder.
        config_hash: hash of the run's configuration.

    Returns:
        Its path (None if there is none), its content, and a line for each checkpoint that was skipped.
    """
    from lit_glm.model.checkpoint import find_damage

    skipped: List[str] = []
    for _, path in list_checkpoints(run_dir):
        try:
            content = load_torch_file(path, mmap=True)
            metadata = content["lit_glm"]
            if metadata.get("config_hash", metadata.get("identity")) != config_hash:  # `identity` before 0.2.0
                raise ValueError("saved by a run with another configuration")
            damage = find_damage(path)
            if damage is not None:
                raise ValueError(f"it is damaged: {damage} has a wrong checksum")
            return path, load_torch_file(path), skipped
        except Exception as error:  # damaged files fail in many ways
            reason = first_line(error)
            skipped.append(f"{path}: skipped ({reason})")
    return None, {}, skipped


def checkpoint_step(path: Optional[Path]) -> int:
    """Return the number of steps done at a checkpoint; 0 without one."""
    return int(path.stem[5:]) if path is not None else 0
