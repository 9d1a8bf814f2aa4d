"""Times of a run: the phase timer, throughput formulas, step-time percentiles and the warm-up slowdown."""

import operator
import time
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import numpy as np


@dataclass
class PhaseDurations:
    """Phase durations in seconds. The first three are nested, hence p_core >= p_train >= p_whole by construction."""

    pure_compute: float = 0.0
    """Forward, backward and optimizer step, the device synchronised at both ends."""
    no_eval: float = 0.0
    """Training steps, including waiting for data; contains pure_compute."""
    raw_train: float = 0.0
    """First training step to the end of training, evaluations included; contains no_eval."""
    init: float = 0.0
    """Entry of `train` to the first training step, the first evaluation included."""

    def __add__(self, other: "PhaseDurations") -> "PhaseDurations":
        return PhaseDurations(*map(operator.add, astuple(self), astuple(other)))


def samples_per_second(samples: int, seconds: float) -> Optional[float]:
    """Return samples per second; None without samples or time."""
    return samples / seconds if samples > 0 and seconds > 0 else None


def throughput_metrics(samples: int, seconds: PhaseDurations) -> Dict[str, Optional[float]]:
    """Compute the throughputs of the published table.

    Args:
        samples: examples trained on, all ranks together; a partial last batch counts its actual size.
        seconds: durations of the slowest rank in each phase.

    Returns:
        p_whole, p_train, p_core in samples per second, and the durations that they are computed from.
    """
    return {
        "p_whole": samples_per_second(samples, seconds.raw_train),
        "p_train": samples_per_second(samples, seconds.no_eval),
        "p_core": samples_per_second(samples, seconds.pure_compute),
        "init_time": seconds.init,
        "raw_train_time": seconds.raw_train,
        "no_eval_time": seconds.no_eval,
        "pure_compute_time": seconds.pure_compute,
    }


def slowest_rank(ranks: Sequence[PhaseDurations]) -> PhaseDurations:
    """Return the longest duration of any rank per phase; the phases stay nested."""
    return PhaseDurations(*map(max, zip(*map(astuple, ranks))))


@dataclass
class StepTimes:
    """Durations of one step in seconds."""

    data: float
    """Waiting for the batch and its copy to the device; the rest of `step` after `compute` is bookkeeping."""
    compute: float
    """Forward, backward and optimizer step."""
    step: float
    """Whole step, since the end of the previous one, without evaluations and checkpoints."""


class PhaseTimer:
    """Phase timer; every moment of training belongs to one step, or to an evaluation or a checkpoint."""

    def __init__(self, waited: Callable[[], float] = lambda: 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        """Set all sums to zero.

        Args:
            waited: returns the seconds that training has waited for data so far.
            now: clock function.
        """
        self._waited, self._now = waited, now
        self._seconds = PhaseDurations()
        self._train_start = self._step_start = self._batch_ready = self._waited_before = 0.0

    def training_starts(self) -> None:
        """Mark the start of training, before the first batch is requested."""
        self._train_start = self._step_start = self._now()
        self._waited_before = self._waited()

    def batch_ready(self) -> None:
        """Mark that the batch is on the device; the caller has synchronised."""
        self._batch_ready = self._now()

    def step_computed(self) -> StepTimes:
        """Mark the end of a step and return its durations; the caller has synchronised."""
        now, waited = self._now(), self._waited()
        times = StepTimes(waited - self._waited_before, now - self._batch_ready, now - self._step_start)
        self._waited_before = waited
        self._seconds.pure_compute += times.compute
        self._seconds.no_eval += times.step
        self._step_start = now
        return times

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude an evaluation or a checkpoint from the step; it is part of raw_train only."""
        start = self._now()
        yield
        self._step_start += self._now() - start

    def seconds(self) -> PhaseDurations:
        """Return the durations so far; raw_train up to now."""
        raw = self._now() - self._train_start if self._train_start else 0.0
        return PhaseDurations(self._seconds.pure_compute, self._seconds.no_eval, max(raw, self._seconds.no_eval))


PERCENTILES = (50, 90, 99)


def num_timing_warmup_steps(steps: int) -> int:
    """Return the number of first steps left out of percentiles: a twentieth, at least 1 and at most 50."""
    return min(50, max(1, steps // 20)) if steps > 1 else 0


def drop_warmup(seconds: Any) -> Any:
    """Drop the warm-up steps, [steps] -> [steps after warm-up]."""
    return np.asarray(seconds, float)[num_timing_warmup_steps(len(seconds)) :]


def step_time_summary(seconds: Any) -> Optional[Dict[str, float]]:
    """Summarise step times after warm-up, in seconds; None without a step.

    Returns:
        p50, p90, p99, mean and number of steps.
    """
    times = drop_warmup(seconds)
    if not len(times):
        return None
    summary: Dict[str, float] = {f"p{share}": float(np.percentile(times, share)) for share in PERCENTILES}
    return {**summary, "mean": float(times.mean()), "count": len(times)}


def warmup_slowdown(compute: Any, flops: Any) -> Optional[Dict[str, float]]:
    """Compare the first steps with later ones: first use of memory, loading and selection of kernels.

    Args:
        compute: [steps] compute seconds.
        flops: [steps] FLOPs; steps differ because the lengths of their examples do.

    Returns:
        count and seconds of the warm-up, and its slowdown relative to later steps per FLOP (`slowdown`); None with
        fewer than four later steps, or if seconds or FLOPs of a step are unknown.
    """
    seconds, work = np.asarray(compute, float), np.asarray(flops, float)
    first = num_timing_warmup_steps(len(seconds))
    if len(seconds) != len(work) or len(seconds) - first < 4 or not (work > 0).all() or not (seconds > 0).all():
        return None
    later = float(np.median(seconds[first:] / work[first:]))
    first_seconds = float(seconds[:first].sum())
    return {"count": first, "seconds": first_seconds, "slowdown": first_seconds / float(work[:first].sum()) / later}
