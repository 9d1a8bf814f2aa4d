"""The training step: scores to loss, gradient, clipped and averaged, to an update, as published."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Union

import pytorch_lightning as pl
import torch
from torch import Tensor

from lit_glm.batches.types import FlatBatch, PaddedBatch
from lit_glm.config.schema import TrainConfig
from lit_glm.model.glm import GLM
from lit_glm.model.scoring import EVAL_MASK, TRAIN_MASK, choice_loss, score_table
from lit_glm.training.optimizer import LearningRateSchedule, make_optimizer


@dataclass
class StepValues:
    """What one step came to, as numbers."""

    loss: float
    """Mean over the ranks, before the update."""
    own_loss: float
    """Of this rank."""
    lr: Optional[float]
    """What the update used; None if the step was skipped."""
    grad_norm: Optional[float]
    """Before clipping, after averaging over the ranks; None if the step was skipped."""
    loss_scale: Optional[float]


@dataclass
class StepOutcome:
    """The same on the device, until somebody reads it."""

    loss: Tensor
    own_loss: Tensor
    lr: Optional[float]
    grad_norm: Optional[Tensor]
    loss_scale: Optional[float]
    stop_requested: bool
    """Whether any rank was asked to stop."""

    def read(self) -> StepValues:
        """All values in one copy from the device; waits for it."""
        norm = self.loss if self.grad_norm is None else self.grad_norm
        loss, own, norm_value = torch.stack([self.loss.float(), self.own_loss.float(), norm.float()]).tolist()
        return StepValues(loss, own, self.lr, None if self.grad_norm is None else norm_value, self.loss_scale)


class RecordModule(pl.LightningModule):
    """GLM with its training step. Steps are counted here: a skipped step counts too."""

    def __init__(self, glm: GLM, config: TrainConfig, seed: Callable[[int], Any]) -> None:
        """Wrap a model.

        Args:
            glm: the model.
            config: the run's.
            seed: seeds all generators that dropout draws from; a vendor's are not torch's.
        """
        super().__init__()
        self.automatic_optimization = False  # clipping after every backward, and steps that are skipped, as published
        self.glm = glm
        self._config = config
        self._seed = seed
        self.steps_done = 0
        self.steps_skipped = 0
        self.stop_requested = False
        """Set by a signal handler; shared with all ranks in the next step."""
        self.outcome: Optional[StepOutcome] = None
        self.identity = ""
        """Of the configuration, so that a checkpoint is not taken for another run's."""

    def forward(self, batch: Union[FlatBatch, PaddedBatch]) -> Tensor:
        """[B, C] scores; slots without a candidate hold the mask value of training or evaluation."""
        if self.training:
            return score_table(self.glm, batch, TRAIN_MASK)
        return score_table(self.glm, batch, EVAL_MASK, slice_size=10)

    def training_step(self, batch: Union[FlatBatch, PaddedBatch], batch_idx: int) -> None:
        """One step, counted from 1; leaves what came of it in `outcome`."""
        step = self.steps_done + 1
        # Dropout is a function of (seed, step, rank) and not of what was drawn before: a resumed run draws the same.
        self._seed((self._config.seed * 1_000_003 + step) * 4_099 + self.global_rank)
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        precision: Any = self.trainer.precision_plugin

        accumulate = self._config.optimizer.accumulate
        loss = choice_loss(self(batch))
        mean, stops = self._over_ranks(loss.detach())
        lr: Optional[float] = None
        norm: Optional[Tensor] = None
        scale = precision.loss_scale if hasattr(precision, "loss_scale") else None
        finite = torch.isfinite(mean)
        # Reading a value makes the host wait for the device. With one micro-batch an update, the backward pass is asked
        # for before the loss is looked at, so that the device has work meanwhile; gradients of a loss that is not
        # finite are thrown away. With several, they would spoil those of the micro-batches before.
        if accumulate == 1 or finite:
            self.manual_backward(loss if accumulate == 1 else loss / accumulate)
        updates = step % accumulate == 0
        if finite:
            if not hasattr(precision, "unscale") or precision.unscale(optimizer):
                norm = torch.nn.utils.clip_grad_norm_(
                    [p for group in optimizer.param_groups for p in group["params"]], self._config.optimizer.clip_grad
                )
                lr = schedule.rate
                if updates:
                    optimizer.step()
                    schedule.step()
            if updates or norm is None:
                optimizer.zero_grad(set_to_none=True)
        elif accumulate == 1:
            self.zero_grad(set_to_none=True)
        if norm is None:
            self.steps_skipped += 1
        self.steps_done = step
        self.outcome = StepOutcome(mean, loss.detach(), lr, norm, scale, bool(stops))

    def _over_ranks(self, loss: Tensor) -> "tuple[Tensor, Any]":
        """Mean loss, and whether a rank was asked to stop, in one collective."""
        if self.trainer.world_size == 1:
            return loss, self.stop_requested
        both = torch.stack([loss.float(), loss.new_tensor(float(self.stop_requested)).float()])
        torch.distributed.all_reduce(both)
        both = both / self.trainer.world_size
        return both[0], both[1] > 0

    def configure_optimizers(self) -> Any:
        """AdamW and the learning-rate schedule."""
        optimizer = make_optimizer(self.glm, self._config.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": LearningRateSchedule(optimizer, self._config.optimizer)}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Never called by Lightning under manual optimisation; says that the schedule is ours."""
        scheduler.step()

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Save the counters beside weights, optimizer and schedule."""
        checkpoint["lit_glm"] = {
            "steps_done": self.steps_done,
            "steps_skipped": self.steps_skipped,
            "identity": self.identity,
        }

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Restore the counters."""
        self.steps_done = checkpoint["lit_glm"]["steps_done"]
        self.steps_skipped = checkpoint["lit_glm"]["steps_skipped"]
