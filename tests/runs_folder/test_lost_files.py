"""A run that is resumed without all of its files: no figure that depends on what is lost, and the reason."""

import json
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from conftest import lit_glm_here, rows
from lit_glm.metrics.benchmark_callback import BenchmarkCallback
from lit_glm.runs.result import extend_times_to_end

DEBUG = ["experiment=debug", "run.max_steps=8", "run.checkpoint_interval_steps=3", "run.eval_interval_samples=12"]
STOPPED_AFTER = 6  # asked to in the step before
FIGURES = ("e2e_time", "p_whole", "p_train", "p_core", "init_time", "step_s")


def stopped_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    real = BenchmarkCallback._write_step

    def stop(self: Any, step: int, *values: Any) -> None:
        real(self, step, *values)
        if step == STOPPED_AFTER - 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkCallback, "_write_step", stop)
        assert lit_glm_here("train", *DEBUG, f"hydra.run.dir={folder}") == 128 + signal.SIGTERM
    return folder


def edit_result(folder: Path, **changes: Any) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_rows(folder: Path) -> None:
    lines = (folder / "steps.csv").read_text().splitlines(keepends=True)
    (folder / "steps.csv").write_text("".join(lines[:2] + lines[4:]))


def corrupt_a_time(folder: Path) -> None:
    lines = (folder / "steps.csv").read_text().splitlines(keepends=True)
    (folder / "steps.csv").write_text("".join(lines).replace(lines[2], lines[2].replace("0.", "0.\x00", 9)))


TIMES = ("e2e_time", "raw_train_time", "init_time", "training_spans")
STEP_FIGURES = {"p_train", "p_core", "step_s"}
RESULT_FIGURES = {"e2e_time", "p_whole", "init_time"}


@pytest.mark.parametrize(
    ("lose", "unknown", "reason"),
    [
        (lambda folder: None, set(), None),
        (lambda folder: (folder / "result.json").unlink(), RESULT_FIGURES, "result.json of the 6 steps"),
        pytest.param(
            lambda folder: (folder / "result.json").write_text("{"),
            RESULT_FIGURES,
            "result.json of the 6 steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: edit_result(folder, global_steps=3),
            RESULT_FIGURES,
            "result.json of the 6 steps",
            marks=pytest.mark.slow,
        ),
        (
            lambda folder: edit_result(folder, raw_train_time="long"),
            {"p_whole"},
            "result.json lacks times of the 6 steps",
        ),
        pytest.param(drop_rows, STEP_FIGURES, "steps.csv has 4 of the 6 steps", marks=pytest.mark.slow),
        (corrupt_a_time, STEP_FIGURES, "steps.csv has 5 of the 6 steps"),
        (lambda folder: (folder / "steps.csv").unlink(), STEP_FIGURES, "steps.csv has 0 of the 6 steps"),
    ],
)
def test_metrics_of_lost_rows_are_null_with_a_reason(
    lose: Callable[[Path], Any], unknown: Any, reason: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder = stopped_run(tmp_path / "run", monkeypatch)
    lose(folder)
    capfd.readouterr()
    assert lit_glm_here("train", *DEBUG, f"run.resume={folder}") == 0
    out = capfd.readouterr().out
    result: Dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert {name for name in FIGURES if result[name] is None} == unknown
    assert result["global_steps"] == 8
    if reason is not None:
        assert reason in result["missing_data"][0]
        assert reason in out.splitlines()[-1]
    assert bool(unknown) == bool(result["missing_data"])


def test_result_and_tables_are_written_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint is written after result.json of its step, and the tables of its steps."""
    from lit_glm.runs import checkpoints

    seen = []
    real = checkpoints.save

    def save(content: Any, target: Path) -> None:
        folder = target.parent.parent
        step = checkpoints.checkpoint_step(target)
        result = json.loads((folder / "result.json").read_text())
        seen.append((step, result["global_steps"], len(rows(folder / "steps.csv"))))
        real(content, target)

    monkeypatch.setattr(checkpoints, "save", save)
    assert lit_glm_here("train", *DEBUG, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert seen == [(3, 3, 3), (6, 6, 6), (8, 8, 8)]


def edit_environment(folder: Path, **changes: Any) -> None:
    path = folder / "environment.json"
    content = json.loads(path.read_text())
    for part in (content, *content["parts"]):
        part.update(changes)
    path.write_text(json.dumps(content))


def test_a_run_that_was_resumed_on_another_machine_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder = stopped_run(tmp_path / "run", monkeypatch)
    edit_environment(folder, cpu="Another CPU", cores=96)
    assert lit_glm_here("train", *DEBUG, f"run.resume={folder}") == 0
    environment = json.loads((folder / "environment.json").read_text())
    assert [part["cpu"] == "Another CPU" for part in environment["parts"]] == [True, False]
    assert environment["cpu"] == environment["parts"][1]["cpu"]
    changes = json.loads((folder / "result.json").read_text())["environment_changes"]
    assert [change.split(" ", 1)[0] for change in changes] == ["cpu", "cores"]
    assert changes[0].startswith("cpu Another CPU -> ")
    assert "on several machines: cpu Another CPU" in capfd.readouterr().out
    assert lit_glm_here("report", str(folder)) == 0
    text = capfd.readouterr().out
    assert "resumed on another machine" in text
    assert "its parts were measured on different machines (cpu Another CPU" in text


def test_the_time_from_the_last_record_to_a_failure_is_part_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that hangs and is resumed is no faster than one that does not hang."""
    folder, hangs_s, recorded = tmp_path / "run", 0.3, {}
    real = BenchmarkCallback._write_step

    def hang_and_fail(self: Any, step: int, *values: Any) -> None:
        real(self, step, *values)
        if step == STOPPED_AFTER - 1:
            recorded.update(json.loads((folder / "result.json").read_text()))
            time.sleep(hangs_s)
            raise RuntimeError("a device was lost")

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkCallback, "_write_step", hang_and_fail)
        assert lit_glm_here("train", *DEBUG, f"hydra.run.dir={folder}") == 1
    failed = json.loads((folder / "result.json").read_text())
    added = failed["e2e_time"] - recorded["e2e_time"]
    assert added >= hangs_s
    assert failed["raw_train_time"] - recorded["raw_train_time"] == pytest.approx(added)
    assert failed["p_whole"] == pytest.approx(failed["num_trained_samples"] / failed["raw_train_time"])
    assert failed["training_spans"][0][1] - recorded["training_spans"][0][1] == pytest.approx(added)

    def fail_before_training(self: Any, *arguments: Any) -> None:
        raise RuntimeError("no device")

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkCallback, "on_train_start", fail_before_training)
        assert lit_glm_here("train", *DEBUG, f"run.resume={folder}") == 1
    again = json.loads((folder / "result.json").read_text())
    assert {name: again[name] for name in TIMES} == {name: failed[name] for name in TIMES}
    assert lit_glm_here("train", *DEBUG, f"run.resume={folder}") == 0
    finished = json.loads((folder / "result.json").read_text())
    assert finished["earlier_e2e_time"] == failed["e2e_time"]
    assert finished["raw_train_time"] > failed["raw_train_time"]
    assert finished["training_spans"][0] == failed["training_spans"][0]


def test_time_after_the_end_of_a_run_is_not_part_of_it(tmp_path: Path) -> None:
    """Another rank of a torchrun may hang when rank 0 has written how the run ended."""
    ended = {"status": "success", "earlier_e2e_time": 0.0, "e2e_time": 5.0, "raw_train_time": 4.0}
    (tmp_path / "result.json").write_text(json.dumps(ended))
    extend_times_to_end(tmp_path, time.monotonic() - 60.0)
    assert json.loads((tmp_path / "result.json").read_text()) == ended
    (tmp_path / "result.json").write_text(json.dumps({**ended, "status": "running", "raw_train_time": None}))
    extend_times_to_end(tmp_path, time.monotonic() - 60.0)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["e2e_time"] >= 60.0
    assert found["raw_train_time"] is None
