"""Points go to the loggers every few steps and at each evaluation, after the hyperparameters."""

from types import SimpleNamespace
from typing import Any, List

from lit_glm.metrics.loggers import MetricLogging
from lit_glm.metrics.timing import PhaseDurations
from lit_glm.training.module import StepMetrics


def test_points_at_each_tenth_step_and_each_evaluation() -> None:
    done: List[str] = []
    account: Any = SimpleNamespace(
        accuracy=0.5,
        durations=lambda: PhaseDurations(1.0, 2.0, 3.0),
        samples_here=lambda step: 40,
        peak_memory=lambda: 2.0**30,
    )
    logger = SimpleNamespace(
        log_metrics=lambda metrics, step: done.append(f"{step}: {' '.join(sorted(metrics))}"),
        log_hyperparams=lambda params: done.append(str(params)),
    )
    curves = MetricLogging(account, {"bs": 4}, every_steps=10)
    curves.begin([logger], 0, 0)
    for step in (9, 10, 11, 12):
        curves.step([logger], step, 12 if step == 12 else 0, StepMetrics(1.5, 1.5, 0.1, None, None))
    every = "mem/gib perf/p_core perf/p_train perf/p_whole train/loss train/lr"
    assert done == ["{'bs': 4}", "0: val/acc", f"10: {every}", f"12: {every} val/acc"]
