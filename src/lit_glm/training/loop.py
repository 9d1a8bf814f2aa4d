"""Lightning's loop over steps, without what a run of this project has no use for.

Lightning looks at each step whether to validate, to step a schedule, to gather what was logged, and wraps each hook: a
twentieth of a step of glm_tiny. Evaluation, schedule and files are ours (`lit_glm.bench.recorder`). A callback that is
not of this project may rely on any of it, so with one the loop is Lightning's own.
"""

from collections import OrderedDict
from typing import Any

from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop


def shorten(trainer: Any) -> None:
    """Have a trainer loop over steps without detours, if all of its callbacks are this project's."""
    if all(type(callback).__module__.startswith("lit_glm.") for callback in trainer.callbacks):
        loop: Any = trainer.fit_loop.epoch_loop
        loop.__class__ = _Steps
        precision: Any = trainer.precision_plugin
        precision.calls_hooks = False


class _Steps(_TrainingEpochLoop):
    """A step is a batch, the hooks before, `training_step`, the hooks after; Lightning's counters go along."""

    def advance(self, data_fetcher: Any) -> None:
        trainer: Any = self.trainer
        module, data, progress = trainer.lightning_module, trainer.datamodule, self.batch_progress
        batch, _, _ = next(data_fetcher)
        batch = data.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
        number = self.batch_idx + 1
        progress.increment_ready()
        for callback in trainer.callbacks:
            callback.on_train_batch_start(trainer, module, batch, number)
        progress.increment_started()
        self.manual_optimization.run(OrderedDict(batch=batch, batch_idx=number))
        progress.increment_processed()
        for callback in trainer.callbacks:
            callback.on_train_batch_end(trainer, module, None, batch, number)
        progress.increment_completed()

    def on_advance_end(self, data_fetcher: Any) -> None:
        self._batches_that_stepped += 1
        if self.trainer.should_stop:
            self._save_loggers_on_train_batch_end()
