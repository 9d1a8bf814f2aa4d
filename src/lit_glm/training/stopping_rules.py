"""Rules for evaluating and ending a run as published, as pure functions of its counters."""

import math
from typing import Optional

from lit_glm.config.schema import RunConfig


def is_evaluation_due(step: int, global_batch: int, run: RunConfig) -> bool:
    """Return whether an evaluation follows this step by the interval rule.

    Args:
        step: step, counted from 1.
        global_batch: examples per step over all ranks; samples = step x global_batch.
        run: interval, start and limit.
    """
    samples = step * global_batch
    if samples >= run.max_samples:
        return True
    every = math.ceil(run.eval_interval_samples / global_batch)
    return step > 1 and samples >= run.eval_start_samples and step % every == 0


def next_evaluation_step(step: int, global_batch: int, run: RunConfig, last: int) -> int:
    """Return the next step after this one that is followed by an evaluation.

    Args:
        step: steps done.
        global_batch: examples per step over all ranks.
        run: interval, start and limit.
        last: the last step of the run, which is always followed by an evaluation.
    """
    every = math.ceil(run.eval_interval_samples / global_batch)
    due = max(2, step + 1, math.ceil(run.eval_start_samples / global_batch))
    return min(last, -(-due // every) * every)


def has_reached_limit(step: int, global_batch: int, run: RunConfig) -> bool:
    """Return whether training ends after this step: more than max_samples, or max_steps reached."""
    return step * global_batch > run.max_samples or (run.max_steps is not None and step >= run.max_steps)


def has_converged(accuracy: Optional[float], run: RunConfig) -> bool:
    """Return whether the last evaluation reached the target."""
    return accuracy is not None and accuracy >= run.target_accuracy
