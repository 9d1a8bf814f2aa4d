"""Training step as published: scores, loss, gradients (averaged and clipped), update; and atomic checkpoints."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from lit_glm.compat import load_torch_file
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import PackedBatch, PaddedBatch
from lit_glm.hardware.precision import LossScalingPrecision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.glm import GLM
from lit_glm.model.scoring import EVAL_MASK, TRAIN_MASK, candidate_loss, candidate_scores
from lit_glm.runs import checkpoints
from lit_glm.training.optimizer import clip_gradients, make_optimizer, make_schedule


@dataclass
class StepMetrics:
    """Metrics of one step, as numbers."""

    loss: float
    """Mean loss over the ranks, before the update."""
    local_loss: float
    """Loss of this rank."""
    lr: Optional[float]
    """Learning rate of the update; None if the step was skipped."""
    grad_norm: Optional[float]
    """Gradient norm after averaging over the ranks, before clipping; None if the step was skipped."""
    loss_scale: Optional[float]


@dataclass
class PendingStepMetrics:
    """Metrics of one step, of which some are still on the device."""

    loss: float
    local_loss: Tensor
    lr: Optional[float]
    grad_norm: Optional[Tensor]
    loss_scale: Optional[float]
    stop_requested: bool
    """Whether any rank has received a stop request."""

    def read(self) -> StepMetrics:
        """Wait for the device and copy all values in one transfer."""
        norm = self.local_loss if self.grad_norm is None else self.grad_norm
        local_loss, norm_value = torch.stack([self.local_loss.float(), norm.float()]).tolist()
        return StepMetrics(
            self.loss, local_loss, self.lr, None if self.grad_norm is None else norm_value, self.loss_scale
        )


class RecordModule(pl.LightningModule):
    """LightningModule of GLM with the published training step. It counts all steps, including skipped ones."""

    def __init__(self, glm: GLM, config: TrainConfig, runtime: Runtime) -> None:
        """Wrap a model."""
        super().__init__()
        self.automatic_optimization = False  # clipping after every backward, and skipped steps, as published
        self.glm = glm
        self._config = config
        self._runtime = runtime
        self.steps_done = 0
        self.steps_skipped = 0
        self.stop_requested = False
        """Set by a signal handler; shared with all ranks in the next step."""
        self.pending_metrics: Optional[PendingStepMetrics] = None
        self.config_hash = ""
        """Hash of the configuration, which identifies the run of a checkpoint."""
        self._restored_gradients: Optional[List[Optional[Tensor]]] = None

    def forward(self, batch: Union[PackedBatch, PaddedBatch]) -> Tensor:
        """Compute [B, C] scores; slots without a candidate contain the mask value of training or evaluation."""
        if self.training:
            return candidate_scores(self.glm, batch, TRAIN_MASK)
        return candidate_scores(self.glm, batch, EVAL_MASK, slice_size=10)

    def training_step(self, batch: Union[PackedBatch, PaddedBatch], batch_idx: int) -> None:
        """Run one step, counted from 1, and store its metrics in `pending_metrics`."""
        step = self.steps_done + 1
        # Dropout depends only on (seed, step, rank), so that a resumed run draws the same masks.
        self._runtime.manual_seed((self._config.seed * 1_000_003 + step) * 4_099 + self.global_rank)
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        precision: Any = self.trainer.precision_plugin
        self._restore_gradients(optimizer)

        accumulate = self._config.optimizer.gradient_accumulation_steps
        loss = candidate_loss(self(batch))
        read = self._start_loss_reduction(loss.detach())
        lr: Optional[float] = None
        norm: Optional[Tensor] = None
        scaled = precision if isinstance(precision, LossScalingPrecision) else None
        scale = scaled.loss_scale if scaled is not None else None
        # Reading a value waits for the device. With one micro-batch per update, the backward pass is launched before
        # the loss is read, so that the device has work meanwhile; gradients of a loss that is not finite are discarded.
        # With several, they would corrupt those of earlier micro-batches, which are kept: as published, the gradients
        # of a window whose last loss is not finite are part of the next update.
        early = read() if accumulate > 1 else None
        if early is None or math.isfinite(early[0]):
            self.manual_backward(loss if accumulate == 1 else loss / accumulate)
        total, stops = early or read()
        mean = total / self.trainer.world_size
        is_update_step = step % accumulate == 0
        if math.isfinite(mean):
            if scaled is not None:
                scaled.unscale_(optimizer)
            clipped = clip_gradients(self._optimizer_parameters(optimizer), self._config.optimizer.clip_grad)
            if scaled is None or scaled.update_scale(clipped):
                norm, lr = clipped, schedule.get_last_lr()[0]
                if is_update_step:
                    optimizer.step()
                    schedule.step()
            if is_update_step or norm is None:
                optimizer.zero_grad(set_to_none=True)
        elif accumulate == 1:
            self.zero_grad(set_to_none=True)
        if norm is None:
            self.steps_skipped += 1
        self.steps_done = step
        self.pending_metrics = PendingStepMetrics(mean, loss.detach(), lr, norm, scale, stops > 0)

    def _start_loss_reduction(self, loss: Tensor) -> Callable[[], List[float]]:
        """Start one all-reduce of the loss and the stop request; return a function that waits for both sums."""
        if self.trainer.world_size == 1:
            read, stops = self._runtime.to_host_async(loss.float().reshape(1)), float(self.stop_requested)
            return lambda: [read()[0], stops]
        stop = torch.full_like(loss, float(self.stop_requested), dtype=torch.float32)  # filled there, not copied
        both = torch.stack([loss.float(), stop])
        return self._runtime.to_host_async(both, torch.distributed.all_reduce(both, async_op=True))

    @staticmethod
    def _optimizer_parameters(optimizer: Any) -> List[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def configure_optimizers(self) -> Any:
        """Create AdamW and the learning-rate schedule."""
        optimizer = make_optimizer(self.glm, self._config.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": make_schedule(optimizer, self._config.optimizer)}

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Add the counters and the accumulated gradients to weights, optimizer and schedule."""
        gradients = [parameter.grad for parameter in self._optimizer_parameters(self.optimizers())]
        checkpoint["lit_glm"] = {
            "steps_done": self.steps_done,
            "steps_skipped": self.steps_skipped,
            "config_hash": self.config_hash,
            "gradients": None if all(gradient is None for gradient in gradients) else gradients,
        }

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Restore the counters; gradients are restored in the next step, when the optimizer has its parameters."""
        self.steps_done = checkpoint["lit_glm"]["steps_done"]
        self.steps_skipped = checkpoint["lit_glm"]["steps_skipped"]
        self._restored_gradients = checkpoint["lit_glm"].get("gradients")

    def _restore_gradients(self, optimizer: Any) -> None:
        if self._restored_gradients is None:
            return
        for parameter, gradient in zip(self._optimizer_parameters(optimizer), self._restored_gradients):
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self._restored_gradients = None


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
        return load_torch_file(Path(path)) if content is None else content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink()
