"""Tells the phases of a step apart. Pure: it reads a clock and keeps sums; who calls it when is the recorder's."""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator

from lit_glm.bench.figures import Seconds


@dataclass
class StepTimes:
    """Seconds of one step."""

    data: float
    """Waiting for the batch and its way to the device; what is left of `step` is bookkeeping."""
    compute: float
    """Forward, backward, optimizer."""
    step: float
    """All of it: since the end of the step before, but for evaluations and checkpoints."""


class PhaseClock:
    """Consecutive intervals: every moment of training belongs to one step, or to an evaluation or a checkpoint."""

    def __init__(self, waited: Callable[[], float] = lambda: 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        """Set all sums to zero.

        Args:
            waited: seconds that training has waited for data so far; measured where it waits.
            now: the clock.
        """
        self._waited, self._now = waited, now
        self._seconds = Seconds()
        self._train_start = self._mark = self._ready = self._waited_before = 0.0

    def training_starts(self) -> None:
        """The first step is about to wait for its batch."""
        self._train_start = self._mark = self._now()
        self._waited_before = self._waited()

    def batch_ready(self) -> None:
        """The batch is on the device; the caller has synchronised."""
        self._ready = self._now()

    def step_computed(self) -> StepTimes:
        """The optimizer is done; the caller has synchronised."""
        now, waited = self._now(), self._waited()
        times = StepTimes(waited - self._waited_before, now - self._ready, now - self._mark)
        self._waited_before = waited
        self._seconds.pure_compute += times.compute
        self._seconds.no_eval += times.step
        self._mark = now
        return times

    @contextmanager
    def outside_steps(self) -> Iterator[None]:
        """An evaluation or a checkpoint: part of raw_train, of no step."""
        start = self._now()
        yield
        self._mark += self._now() - start

    def seconds(self) -> Seconds:
        """The sums so far; raw_train up to this moment."""
        raw = self._now() - self._train_start if self._train_start else 0.0
        return Seconds(self._seconds.pure_compute, self._seconds.no_eval, max(raw, self._seconds.no_eval))
