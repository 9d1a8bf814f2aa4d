"""Points go to the loggers every few steps and at each evaluation, after the hyperparameters."""

import time
from types import SimpleNamespace
from typing import Any, List

import pytest

from lit_glm.config.schema import TrainConfig
from lit_glm.metrics import loggers
from lit_glm.metrics.loggers import MetricLogging
from lit_glm.metrics.timing import PhaseDurations
from lit_glm.training.module import StepMetrics


def test_points_at_each_tenth_step_and_each_evaluation() -> None:
    done: List[str] = []
    account: Any = SimpleNamespace(
        accuracy=0.5,
        evaluated_step=0,
        config=TrainConfig(bs=4),
        durations=lambda: PhaseDurations(1.0, 2.0, 3.0),
        samples_here=lambda step: 40,
        peak_memory=lambda: 2.0**30,
    )
    logger = SimpleNamespace(
        log_metrics=lambda metrics, step: done.append(f"{step}: {' '.join(sorted(metrics))}"),
        log_hyperparams=lambda params: done.append(f"bs {params['bs']}"),
    )
    curves = MetricLogging(account)
    curves.begin([logger], -1)
    curves.log([logger], 0, {})
    for step in (9, 10, 11, 12):
        account.evaluated_step = 12 if step == 12 else 0
        curves.step([logger], step, StepMetrics(1.5, 1.5, 0.1, None, None))
    every = "mem/gib perf/p_core perf/p_train perf/p_whole train/loss train/lr"
    assert done == ["bs 4", "0: val/acc", f"10: {every}", f"12: {every} val/acc"]


class FakeLogger:
    """A double of a logger whose server is away, or slow."""

    def __init__(self, fails: bool = False, slow_s: float = 0.0) -> None:
        self.fails, self.slow_s = fails, slow_s
        self.points: List[Any] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        time.sleep(self.slow_s)
        if self.fails:
            raise ConnectionError("the server is away")
        self.points.append((metrics, step))


def test_failing_logger_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(loggers, "_PAUSE_S", 0.01)
    server = FakeLogger(fails=True)
    logger = loggers.BackgroundLogger(server)
    for step in range(5):
        logger.log_metrics({"a": 1.0}, step)
    logger.close()
    said = capsys.readouterr().err
    assert said.count("failed (the server is away); the run continues") == 1
    assert "curves are incomplete: 5 calls were not sent" in said


def test_a_slow_server_does_not_hold_up_steps(capsys: Any) -> None:
    server = FakeLogger(slow_s=0.1)
    logger, begun = loggers.BackgroundLogger(server, wait_s=0.3), time.monotonic()
    for step in range(20):
        logger.log_metrics({"a": 1.0}, step)
    assert time.monotonic() - begun < 0.1 * 10  # far from what the server takes
    logger.close()
    assert time.monotonic() - begun < 0.1 * 20
    assert "curves are incomplete" in capsys.readouterr().err
    quick = FakeLogger()
    logger = loggers.BackgroundLogger(quick)
    for step in range(20):
        logger.log_metrics({"a": 1.0}, step)
    logger.close()
    assert [step for _, step in quick.points] == list(range(20))
