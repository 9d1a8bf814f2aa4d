from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import lit_glm_here, rows
from lit_glm.config.schema import RunConfig
from lit_glm.training.evaluation import has_converged, has_reached_limit, is_evaluation_due, next_evaluation_step


def test_evaluations_are_due_as_published() -> None:
    run = RunConfig(eval_interval_samples=19200, eval_start_samples=100, max_samples=10**9)
    assert [step for step in range(1, 2401) if is_evaluation_due(step, 40, run)] == [480, 960, 1440, 1920, 2400]
    early = RunConfig(eval_interval_samples=4, eval_start_samples=100, max_samples=10**9)
    assert not is_evaluation_due(1, 200, early)  # never after the first step
    assert [step for step in range(1, 31) if is_evaluation_due(step, 4, early)] == [25, 26, 27, 28, 29, 30]


def test_training_stops_when_max_samples_is_exceeded() -> None:
    """4,000 samples at bs 4 are 1,001 steps, with evaluations after the last two."""
    run = RunConfig(max_samples=4000)
    assert not has_reached_limit(1000, 4, run)
    assert has_reached_limit(1001, 4, run)
    assert [is_evaluation_due(step, 4, run) for step in (999, 1000, 1001)] == [False, True, True]


def test_the_smaller_limit_wins() -> None:
    assert has_reached_limit(10, 4, RunConfig(max_steps=10))
    assert has_reached_limit(3, 4, RunConfig(max_steps=10, max_samples=11))


@pytest.mark.parametrize(("accuracy", "expected"), [(None, False), (0.79, False), (0.8, True)])
def test_converged(accuracy: "float | None", expected: bool) -> None:
    assert has_converged(accuracy, RunConfig(target_accuracy=0.8)) is expected


@given(
    batch=st.integers(1, 300),
    interval=st.integers(1, 5000),
    start=st.integers(0, 3000),
    done=st.integers(0, 400),
)
def test_the_next_evaluation_is_the_first_that_is_due(batch: int, interval: int, start: int, done: int) -> None:
    run = RunConfig(eval_interval_samples=interval, eval_start_samples=start, max_samples=10**9)
    last = 10**6
    found = next_evaluation_step(done, batch, run, last)
    assert found > done
    assert is_evaluation_due(found, batch, run)
    assert not any(is_evaluation_due(step, batch, run) for step in range(done + 1, min(found, done + 50)))


def test_target_reached_only_before_training_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The target is reached before training, and not after the first step: training continues to its limit."""
    accuracies = iter((0.5, 0.1, 0.2))
    monkeypatch.setattr("lit_glm.metrics.benchmark_callback.evaluate", lambda *_: (next(accuracies), []))
    own = ["run.target_accuracy=0.4", "run.max_steps=4", "run.eval_start_samples=1000"]
    assert lit_glm_here("train", "experiment=debug", *own, f"hydra.run.dir={tmp_path}/run") == 0
    assert [row["step"] for row in rows(tmp_path / "run" / "evals.csv")] == ["0", "1", "4"]
    assert "NOT REACHED: accuracy 20.00%, target 40%; stopped by run.max_steps=4" in capfd.readouterr().out
