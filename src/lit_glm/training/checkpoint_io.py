"""Lightning's plugin for checkpoints: written whole or not at all; one that was read already is not read again."""

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO

from lit_glm.runs import checkpoints


class AtomicCheckpointIO(CheckpointIO):
    """Files as `lit_glm.runs.checkpoints` has them."""

    def __init__(self, content: Optional[Dict[str, Any]] = None) -> None:
        """Begin.

        Args:
            content: of the checkpoint that the run goes on from, read when it was looked for.
        """
        self._content = content

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        """Write one.

        Raises:
            RunError: if the disk does not take it.
        """
        # Not every vendor's tensors can be written by every torch, and nobody needs them on a card when they are read.
        checkpoints.save(move_data_to_device(checkpoint, torch.device("cpu")), Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Optional[Any] = None, weights_only: Optional[bool] = None
    ) -> Dict[str, Any]:
        """Read one; never executes code from it."""
        content, self._content = self._content, None
        return checkpoints.load(Path(path)) if content is None else content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one."""
        Path(path).unlink()
