"""Hands the curves to Lightning's loggers, all under the same names, with the run's name and hyperparameters."""

from typing import Any, Dict, Optional

import pytorch_lightning as pl

from lit_glm.bench.figures import rate
from lit_glm.bench.recorder import Recorder


class Curves(pl.Callback):
    """train/loss, train/lr, train/grad_norm, perf/p_core, perf/p_train, perf/p_whole, val/acc, mem/gib over steps."""

    def __init__(self, recorder: Recorder, hyperparameters: Dict[str, Any], every_steps: int = 10) -> None:
        """Choose how often.

        Args:
            recorder: knows the figures.
            hyperparameters: told once.
            every_steps: steps between points; an evaluation is always one.
        """
        self._recorder, self._hyperparameters = recorder, hyperparameters
        self._every = every_steps
        self._evaluated_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Hyperparameters, and the evaluation before training as the first point."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self._hyperparameters)
        self._log(trainer, pl_module.steps_done, {})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A point every few steps."""
        recorder, step = self._recorder, pl_module.steps_done
        if not trainer.loggers or (step % self._every and recorder.evaluated_step == self._evaluated_step):
            return
        account, values = recorder.account, recorder.values
        assert values is not None
        seconds, samples, memory = account.seconds(), account.samples_here(step), account.peak_memory()
        self._log(
            trainer,
            step,
            {
                "train/loss": values.loss,
                "train/lr": values.lr,
                "train/grad_norm": values.grad_norm,
                "perf/p_core": rate(samples, seconds.pure_compute),
                "perf/p_train": rate(samples, seconds.no_eval),
                "perf/p_whole": rate(samples, seconds.raw_train),
                "mem/gib": None if memory is None else memory / 2**30,
            },
        )

    def _log(self, trainer: pl.Trainer, step: int, point: Dict[str, Optional[float]]) -> None:
        if self._recorder.evaluated_step != self._evaluated_step:
            self._evaluated_step = self._recorder.evaluated_step
            point["val/acc"] = self._recorder.account.accuracy
        known = {name: float(value) for name, value in point.items() if value is not None}
        for logger in trainer.loggers if known else []:
            logger.log_metrics(known, step=step)
