"""Hands the curves to Lightning's loggers, all under the same names, with the run's hyperparameters."""

from typing import Any, Dict, List, Optional

from lit_glm.bench.account import Account
from lit_glm.bench.figures import rate
from lit_glm.training.module import StepValues


class Curves:
    """train/loss, train/lr, train/grad_norm, perf/p_core, perf/p_train, perf/p_whole, val/acc, mem/gib over steps."""

    def __init__(self, account: Account, hyperparameters: Dict[str, Any], every_steps: int = 10) -> None:
        """Choose how often.

        Args:
            account: knows the figures.
            hyperparameters: told once.
            every_steps: steps between points; an evaluation is always one.
        """
        self._account, self._hyperparameters, self._every = account, hyperparameters, every_steps
        self._evaluated_step = -1

    def begin(self, loggers: List[Any], step: int, evaluated_step: int) -> None:
        """Hyperparameters, and the evaluation before training as the first point."""
        for logger in loggers:
            logger.log_hyperparams(self._hyperparameters)
        self._log(loggers, step, evaluated_step, {})

    def step(self, loggers: List[Any], step: int, evaluated_step: int, values: StepValues) -> None:
        """A point every few steps."""
        if not loggers or (step % self._every and evaluated_step == self._evaluated_step):
            return
        seconds, samples = self._account.seconds(), self._account.samples_here(step)
        memory = self._account.peak_memory()
        point = {
            "train/loss": values.loss,
            "train/lr": values.lr,
            "train/grad_norm": values.grad_norm,
            "perf/p_core": rate(samples, seconds.pure_compute),
            "perf/p_train": rate(samples, seconds.no_eval),
            "perf/p_whole": rate(samples, seconds.raw_train),
            "mem/gib": None if memory is None else memory / 2**30,
        }
        self._log(loggers, step, evaluated_step, point)

    def _log(self, loggers: List[Any], step: int, evaluated_step: int, point: Dict[str, Optional[float]]) -> None:
        if evaluated_step != self._evaluated_step:
            self._evaluated_step = evaluated_step
            point["val/acc"] = self._account.accuracy
        known = {name: float(value) for name, value in point.items() if value is not None}
        for logger in loggers if known else []:
            logger.log_metrics(known, step=step)
