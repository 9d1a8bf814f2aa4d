"""Checkpoints of a run that goes on: written whole or not at all, the newest good one found again."""

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO

from lit_glm.errors import RunError

_KEEP = 2
_NAME = re.compile(r"step-(\d+)\.ckpt")


class _TakesAll:
    """A file whose first error is kept: torch 1.12 ends the process when a write fails, newer ones hide why."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        """Write, unless that has failed before."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Left to the owner of the file."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary name, flushes to the disk, renames."""

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        """Write one.

        Raises:
            RunError: if the disk does not take it; what was written of it is gone again.
        """
        target = Path(path)
        # Not every vendor's tensors can be written by every torch, and nobody needs them on a card when they are read.
        checkpoint = move_data_to_device(checkpoint, torch.device("cpu"))
        temporary = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                takes_all: Any = _TakesAll(file)
                torch.save(checkpoint, takes_all)
                if takes_all.error is not None:
                    raise takes_all.error
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            if temporary.exists():
                temporary.unlink()
            raise RunError(
                f"{target}: the checkpoint cannot be written ({error}); what was measured is on the disk; make room, "
                f"then go on with run.resume={target.parent.parent}"
            ) from error
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: Any, map_location: Optional[Any] = None, weights_only: Optional[bool] = None
    ) -> Dict[str, Any]:
        """Read one; never executes code from it."""
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        Path(path).unlink()


def load(path: Path) -> Dict[str, Any]:
    """Read a checkpoint of ours onto the CPU."""
    if torch.__version__.startswith("1."):  # no weights_only there
        from lit_glm.model.unpickle import restricted_load

        content: Dict[str, Any] = restricted_load(path)
    else:
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    return content


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}.ckpt"


def all_of(run_dir: Path) -> List[Tuple[int, Path]]:
    """(step, path) of all checkpoints, newest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def tidy(run_dir: Path) -> None:
    """Delete all but the newest few."""
    for _, path in all_of(run_dir)[_KEEP:]:
        path.unlink()


def newest_usable(run_dir: Path, identity: str) -> Tuple[Optional[Path], List[str]]:
    """The newest checkpoint that is whole and belongs to this run.

    Args:
        run_dir: the run folder.
        identity: of the run's configuration.

    Returns:
        Its path, or None; and a line for each that was passed over.
    """
    passed_over: List[str] = []
    for _, path in all_of(run_dir):
        try:
            content = load(path)
            if content["lit_glm"]["identity"] != identity:
                raise ValueError("it belongs to another configuration")
            return path, passed_over
        except Exception as error:  # torn files fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            passed_over.append(f"{path}: passed over ({reason})")
    return None, passed_over
