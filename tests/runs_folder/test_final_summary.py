"""What a run says at its end."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm_here
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.runs.result import final_summary


def said(status: str, *overrides: str, **more: Any) -> str:
    config = validate_config(compose_config("train", ["experiment=debug", *overrides]), TrainConfig)
    result = {
        "status": status,
        "global_steps": 10,
        "num_trained_samples": 40_000,
        "raw_train_time": 12.34,
        "acc": 0.8125,
        "skipped_steps": 0,
        **more,
    }
    return final_summary(result, config, Path("outputs/a"))


def test_final_summary_states_target_and_stop_reason() -> None:
    reached = said("success")
    assert reached.startswith("REACHED: accuracy 81.25%, target 80%, at step 10 (40,000 samples, 12.3 s of training)")
    assert "python -m lit_glm.report outputs/a" in reached
    assert "NOT REACHED: accuracy 81.25%, target 90%; stopped by run.max_steps=10" in said(
        "finished", "run.target_accuracy=0.9"
    )
    by_samples = said("finished", "run.max_steps=null", "run.max_samples=39", acc=None)
    assert "accuracy unknown, target 80%; stopped by run.max_samples=39" in by_samples
    by_callback = said("finished", "run.max_steps=20", "run.max_samples=1000000")
    assert "stopped by a callback at step 10" in by_callback
    assert "resume with run.resume=outputs/a" in said("interrupted")
    assert "no evaluation" in said("finished", "run.evaluate=false", acc=None)
    assert "3 steps without an update" in said("finished", skipped_steps=3)


def test_final_summary_reports_only_a_large_warmup_slowdown() -> None:
    slow = said("success", first_steps={"count": 2, "seconds": 31.2, "slowdown": 2.84})
    assert "the first 2 steps took 31.2 s, 2.8x a steady-state step of the same work" in slow
    assert "warm-up" not in said("success", first_steps={"count": 2, "seconds": 31.2, "slowdown": 1.2})
    assert "warm-up" not in said("success", first_steps=None)


def test_only_the_launcher_writes_the_final_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A run whose launcher was killed after the ranks had finished is complete; the next command writes that."""
    from lit_glm.launch import launcher
    from lit_glm.runs.result import read_result

    arguments = ["experiment=debug", "run.max_steps=2", "logger={}", f"hydra.run.dir={tmp_path / 'run'}"]
    file = tmp_path / "run" / "result.json"
    monkeypatch.setattr(launcher, "settle_status", lambda run_dir: None)  # as if it had been killed before
    assert lit_glm_here("train", *arguments) == 0
    raw = json.loads(file.read_text(encoding="utf-8"))
    assert (raw["status"], raw["outcome"]) == ("running", "finished")
    assert (read_result(tmp_path / "run") or {})["status"] == "finished"
    monkeypatch.undo()
    capfd.readouterr()
    assert lit_glm_here("train", *arguments, f"run.resume={tmp_path / 'run'}") == 0
    assert "the run is complete; nothing to do" in capfd.readouterr().out
    settled = json.loads(file.read_text(encoding="utf-8"))
    assert settled["status"] == "finished"
    del raw["outcome"]
    assert settled == {**raw, "status": "finished"}


def test_a_target_of_zero_is_not_reached_without_an_evaluation(tmp_path: Path) -> None:
    run = ["experiment=debug", "run.max_steps=1", "run.evaluate=false", "run.target_accuracy=0"]
    assert lit_glm_here("train", *run, f"hydra.run.dir={tmp_path}/run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["converged"], result["acc"]) == ("finished", False, None)
