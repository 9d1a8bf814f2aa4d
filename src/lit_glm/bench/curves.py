"""Hands the curves to Lightning's loggers, all under the same names; now and then, off the step path."""

from typing import Any, Dict, List

import pytorch_lightning as pl

from lit_glm.bench.figures import rate
from lit_glm.bench.recorder import Recorder


class Curves(pl.Callback):
    """train/loss, train/lr, train/grad_norm, perf/p_core, perf/p_train, perf/p_whole, val/acc, mem/gib over steps."""

    def __init__(self, recorder: Recorder, every_steps: int = 10) -> None:
        """Choose how often.

        Args:
            recorder: knows the figures.
            every_steps: steps between points; an evaluation is always one.
        """
        self._recorder = recorder
        self._every = every_steps
        self._evaluated_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The evaluation before training is the first point."""
        for logger in trainer.loggers:
            getattr(logger, "experiment", None)  # made here: not every logger's can be made in a thread
        self._log(trainer, pl_module.steps_done, {})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A point every few steps."""
        if trainer.loggers:
            self._point(trainer, pl_module)
            if trainer.should_stop:
                self._recorder.do_rest()  # Lightning saves its loggers now, and few of them bear two threads

    def _point(self, trainer: pl.Trainer, pl_module: Any) -> None:
        recorder, step = self._recorder, pl_module.steps_done
        if step % self._every and recorder.evaluated_step == self._evaluated_step:
            return
        outcome, seconds, samples = pl_module.outcome, recorder.seconds(), recorder.samples_here()
        self._log(
            trainer,
            step,
            {
                "train/loss": outcome.loss,
                "train/lr": outcome.lr,
                "train/grad_norm": outcome.grad_norm,
                "perf/p_core": rate(samples, seconds.pure_compute),
                "perf/p_train": rate(samples, seconds.no_eval),
                "perf/p_whole": rate(samples, seconds.raw_train),
            },
        )

    def _log(self, trainer: pl.Trainer, step: int, point: Dict[str, Any]) -> None:
        if self._recorder.evaluated_step != self._evaluated_step:
            self._evaluated_step = self._recorder.evaluated_step
            point["val/acc"] = self._recorder.accuracy
        if point and trainer.loggers:
            loggers = list(trainer.loggers)
            self._recorder.do_later(lambda: self._hand_over(loggers, step, point))

    def _hand_over(self, loggers: List[Any], step: int, point: Dict[str, Any]) -> None:
        """Fetch the values and call the loggers; not on the step path."""
        if "train/loss" in point:
            memory = self._recorder.peak_memory()
            point["mem/gib"] = None if memory is None else memory / 2**30
        known = {name: float(value) for name, value in point.items() if value is not None}
        for logger in loggers:
            logger.log_metrics(known, step=step)
