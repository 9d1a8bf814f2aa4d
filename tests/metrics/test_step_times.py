"""Percentiles of steps behind the warm-up, and a slow start told from long examples."""

import numpy as np
import pytest

from lit_glm.metrics.timing import slow_start, summary, warm_up


def test_percentiles_leave_the_warm_up_out() -> None:
    assert [warm_up(steps) for steps in (0, 1, 2, 20, 40, 5000)] == [0, 0, 1, 1, 2, 50]
    found = summary([100.0, *np.arange(1.0, 11.0)])
    assert found == pytest.approx({"p50": 5.5, "p90": 9.1, "p99": 9.91, "mean": 5.5, "count": 10})
    assert summary([]) is None
    assert summary([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "mean": 2.0, "count": 1}


def test_a_long_first_batch_is_no_slow_start() -> None:
    flops = np.array([8.0, 1.0, 2.0, 1.0, 4.0, 2.0])
    even = slow_start(flops * 0.5, flops)
    assert even == pytest.approx({"steps": 1, "seconds": 4.0, "slower": 1.0})
    late = slow_start(np.array([12.0, *(flops[1:] * 0.5)]), flops)
    assert late == pytest.approx({"steps": 1, "seconds": 12.0, "slower": 3.0})


@pytest.mark.parametrize(
    ("seconds", "flops"), [([1.0] * 4, [1.0] * 4), ([1.0] * 9, [0.0] * 9), ([], []), ([1.0] * 9, [1.0] * 8)]
)
def test_nothing_is_said_of_what_is_not_known(seconds: "list[float]", flops: "list[float]") -> None:
    assert slow_start(seconds, flops) is None
