"""Percentiles of steps behind the warm-up, and a slow start told from long examples."""

import numpy as np
import pytest

from lit_glm.metrics.timing import num_timing_warmup_steps, step_time_summary, warmup_slowdown


def test_percentiles_leave_the_warm_up_out() -> None:
    assert [num_timing_warmup_steps(steps) for steps in (0, 1, 2, 20, 40, 5000)] == [0, 0, 1, 1, 2, 50]
    found = step_time_summary([100.0, *np.arange(1.0, 11.0)])
    assert found == pytest.approx({"p50": 5.5, "p90": 9.1, "p99": 9.91, "mean": 5.5, "count": 10})
    assert step_time_summary([]) is None
    assert step_time_summary([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "mean": 2.0, "count": 1}


def test_long_first_batch_is_not_a_warmup_slowdown() -> None:
    flops = np.array([8.0, 1.0, 2.0, 1.0, 4.0, 2.0])
    even = warmup_slowdown(flops * 0.5, flops)
    assert even == pytest.approx({"count": 1, "seconds": 4.0, "slowdown": 1.0})
    late = warmup_slowdown(np.array([12.0, *(flops[1:] * 0.5)]), flops)
    assert late == pytest.approx({"count": 1, "seconds": 12.0, "slowdown": 3.0})


@pytest.mark.parametrize(
    ("seconds", "flops"), [([1.0] * 4, [1.0] * 4), ([1.0] * 9, [0.0] * 9), ([], []), ([1.0] * 9, [1.0] * 8)]
)
def test_warmup_slowdown_is_none_without_data(seconds: "list[float]", flops: "list[float]") -> None:
    assert warmup_slowdown(seconds, flops) is None
