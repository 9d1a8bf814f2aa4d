"""Lightning plugin for checkpoints, with atomic writes; a checkpoint that was read already is not read again."""

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO

from lit_glm.runs import checkpoints


class AtomicCheckpointIO(CheckpointIO):
    """CheckpointIO that stores files with `lit_glm.runs.checkpoints`."""

    def __init__(self, content: Optional[Dict[str, Any]] = None) -> None:
        """Create the plugin.

        Args:
            content: content of the checkpoint to resume from, which was read when it was searched.
        """
        self._content = content

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        """Write a checkpoint.

        Raises:
            RunError: if it cannot be written.
        """
        # Not every torch version can serialise every vendor's tensors, and checkpoints are loaded onto the CPU anyway.
        checkpoints.save(move_data_to_device(checkpoint, torch.device("cpu")), Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Optional[Any] = None, weights_only: Optional[bool] = None
    ) -> Dict[str, Any]:
        """Read a checkpoint without executing code from it."""
        content, self._content = self._content, None
        return checkpoints.load(Path(path)) if content is None else content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink()
