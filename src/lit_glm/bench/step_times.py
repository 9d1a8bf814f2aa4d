"""How long single steps took: percentiles behind the warm-up; how much slower the first steps were for their work."""

from typing import Any, Dict, Optional

import numpy as np

PERCENTILES = (50, 90, 99)


def warm_up(steps: int) -> int:
    """How many of the first steps are left out of percentiles: a twentieth, at least 1 and at most 50."""
    return min(50, max(1, steps // 20)) if steps > 1 else 0


def settled(seconds: Any) -> Any:
    """[steps] -> those behind the warm-up."""
    return np.asarray(seconds, float)[warm_up(len(seconds)) :]


def summary(seconds: Any) -> Optional[Dict[str, float]]:
    """Of `step_s`, in seconds, behind the warm-up; None without a step.

    Returns:
        p50, p90, p99 and mean, and how many steps they are of.
    """
    times = settled(seconds)
    if not len(times):
        return None
    found: Dict[str, float] = {f"p{share}": float(np.percentile(times, share)) for share in PERCENTILES}
    return {**found, "mean": float(times.mean()), "count": len(times)}


def slow_start(compute: Any, flops: Any) -> Optional[Dict[str, float]]:
    """The first steps against the later ones: memory is touched, kernels are loaded and chosen for the first time.

    Args:
        compute: [steps] seconds of computing.
        flops: [steps] what was computed in them: steps differ in it by the lengths of their examples.

    Returns:
        steps and seconds of the warm-up, and how many times as long it took as its work does later (`slower`); None
        with fewer than four later steps, or where one of both is not known of every step.
    """
    seconds, work = np.asarray(compute, float), np.asarray(flops, float)
    first = warm_up(len(seconds))
    if len(seconds) != len(work) or len(seconds) - first < 4 or not (work > 0).all() or not (seconds > 0).all():
        return None
    later = float(np.median(seconds[first:] / work[first:]))
    took = float(seconds[:first].sum())
    return {"steps": first, "seconds": took, "slower": took / float(work[:first].sum()) / later}
