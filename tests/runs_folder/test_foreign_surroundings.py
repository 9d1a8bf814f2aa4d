"""What lies around a run or a command: files of the user, other data, odd paths, folders without permission."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Tuple

import pytest

from conftest import lit_glm_here, rows
from lit_glm.config.command_line import CommandLine
from lit_glm.launch.heartbeat import clear_heartbeats
from lit_glm.runs.result import read_result

SHORT = ["experiment=debug", "logger={}", "run.evaluate=false"]


def interrupt(run: Path) -> None:
    """Make a finished run look like one that was interrupted after its checkpoint."""
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**content, "status": "interrupted"}))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", *SHORT, "run.max_steps=3", "hydra.run.dir=run") == 0
    return tmp_path / "run"


def test_single_device_run_ignores_launcher_rank_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod of a training operator, or a shell inside another launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "")
    simulated = ["hardware=r300", "hardware.runtime=simulated"]
    assert lit_glm_here("train", *simulated, *SHORT, "run.max_steps=2", "hydra.run.dir=run") == 0
    assert (read_result(tmp_path / "run") or {})["status"] == "finished"
    assert (tmp_path / "run" / "environment.json").is_file()


def test_user_files_in_subfolders_of_a_run_are_kept(run: Path) -> None:
    for name in ("errors/my-notes.txt", "ranks/notes.txt", "ranks/0", "ranks/0.stack", "ranks/more/file"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("dear")
    clear_heartbeats(run)
    assert sorted(os.listdir(run / "ranks")) == ["more", "notes.txt"]
    interrupt(run)
    assert lit_glm_here("train", *SHORT, "run.max_steps=3", "run.resume=run") == 0
    left = sorted(str(file.relative_to(run)) for file in run.glob("*/**/*") if file.is_file())
    assert {"errors/my-notes.txt", "ranks/notes.txt", "ranks/more/file"} <= set(left)
    assert (run / "errors" / "my-notes.txt").read_text() == "dear"


def test_resume_with_other_data_is_rejected(run: Path, capfd: Any) -> None:
    interrupt(run)
    before = (run / "result.json").read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0')
    (run / "result.json").write_text(before)
    capfd.readouterr()
    assert lit_glm_here("train", *SHORT, "run.max_steps=3", "run.resume=run") == 2
    assert "the run was started with other data" in capfd.readouterr().err
    assert (read_result(run) or {})["status"] == "interrupted"


def test_initial_weights_are_not_needed_to_resume(run: Path) -> None:
    first = ["model.init_checkpoint=run", "hydra.run.dir=second", "run.max_steps=4"]
    assert lit_glm_here("train", *SHORT, *first) == 0
    interrupt(Path("second"))
    shutil.rmtree(run)
    assert lit_glm_here("train", *SHORT, *first[:1], "run.max_steps=4", "run.resume=second") == 0
    assert len(rows(Path("second/steps.csv"))) == 4


def test_resume_auto_of_a_complete_run_does_nothing(run: Path, capfd: Any) -> None:
    """A pod that is restarted after its run has finished uses the same command."""
    capfd.readouterr()
    again = ["run.max_steps=3", "hydra.run.dir=run", "run.resume=auto"]
    assert lit_glm_here("train", *SHORT, *again) == 0
    assert "complete" in capfd.readouterr().out
    assert lit_glm_here("train", *SHORT, "run.max_steps=4", *again[1:]) == 2  # another configuration


def test_damaged_example_metadata_is_rejected_before_evaluation(run: Path, capfd: Any) -> None:
    file = Path(json.loads((run / "job.json").read_text())["config"]["data"]["eval_file"])
    shutil.copytree(file.parent, "eval")
    texts = Path("eval/eval_examples.jsonl")
    whole = texts.read_text(encoding="utf-8")
    scores = ["run", f"data.eval_file=eval/{file.name}", "hydra.run.dir=scores"]
    for damaged, message in (
        (f"{whole}}}{{\n", "is not JSON"),
        (whole.replace("candidates", "choices"), "entry 1 lacks"),
        ("\n".join(whole.splitlines()[::-1]) + "\n", "is of another evaluation file"),
    ):
        texts.write_text(damaged, encoding="utf-8")
        capfd.readouterr()
        assert lit_glm_here("evaluate", *scores) == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_is_scored_on_its_own_data_from_any_folder(
    run: Path, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["data.synthetic.num_train=8", "data.synthetic.num_eval=5", "data.max_seq_length=128"]
    for name in ("data/record", "small"):
        where = tmp_path / "elsewhere" / name
        assert lit_glm_here("prepare", "data=synthetic", *sizes, f"data.out_dir={where}") == 0
    job = json.loads((run / "job.json").read_text())
    file = job["config"]["data"]["eval_file"]
    record = {"synthetic": None, "out_dir": "data/record", "eval_file": "data/record/eval_hdf5/eval_sparse.hdf5"}
    (run / "job.json").write_text(
        json.dumps({**job, "config": {**job["config"], "data": {**job["config"]["data"], **record}}})
    )
    (tmp_path / "data" / "record").mkdir(parents=True)
    shutil.copytree(Path(file).parent, tmp_path / "data" / "record" / "eval_hdf5")
    monkeypatch.chdir(tmp_path / "elsewhere")

    def scores(*overrides: str) -> Tuple[int, str, str]:
        capfd.readouterr()
        status = lit_glm_here("evaluate", str(run), f"hydra.run.dir={tmp_path / 'scores'}", *overrides)
        return (status, *capfd.readouterr())

    status, said, _ = scores()
    assert (status, "examples  16" in said) == (0, True)
    status, said, _ = scores("data.out_dir=small")
    assert (status, "examples  5" in said) == (0, True)
    shutil.rmtree(tmp_path / "data" / "record")  # then only other data are there
    status, _, complaint = scores()
    assert (status, "these are not the evaluation data of" in complaint) == (2, True)
    status, said, _ = scores(f"data.eval_file={record['eval_file']}")
    assert (status, "examples  5" in said) == (0, True)


def test_scores_are_printed_although_their_files_cannot_be_written(
    run: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_glm.evaluate._write_results", full)
    capfd.readouterr()
    assert lit_glm_here("evaluate", "run", "hydra.run.dir=scores") == 1
    said = capfd.readouterr()
    assert "acc  " in said.out
    assert "the predictions cannot be written ([Errno 28] No space left on device)" in said.err


def test_a_folder_without_permission_is_named(run: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/somebody/elses")

    monkeypatch.setattr("lit_glm.runs.run_folder.ensure_available", refused)
    capfd.readouterr()
    assert lit_glm_here("train", *SHORT, "run.max_steps=3", "hydra.run.dir=other") == 2
    said = capfd.readouterr().err
    assert "/somebody/elses: cannot be accessed (Permission denied)" in said
    assert "Traceback" not in said
    assert lit_glm_here("evaluate", f"report.machine={'x' * 300}") == 2
    assert "init_checkpoint is not set" in capfd.readouterr().err


@pytest.mark.parametrize("key", ["stall_timeout_s", "rendezvous_timeout_s", "shutdown_timeout_s"])
def test_excessive_timeout_is_rejected(key: str, capfd: Any) -> None:
    assert lit_glm_here("train", "experiment=debug", f"run.{key}=1e15") == 2
    assert "at most 1e8 (three years)" in capfd.readouterr().err


def test_config_dir_with_an_apostrophe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "it's" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - debug\nrun:\n  max_steps: 2\n")
    assert CommandLine.read(["--config-dir=it's"]).searchpath
    assert lit_glm_here("train", "--config-dir", "it's", "experiment=mine", "hydra.run.dir=run") == 0, (
        capfd.readouterr()
    )
    assert len(rows(Path("run/steps.csv"))) == 2


@pytest.mark.slow
def test_sweeper_params_in_a_config_file_run_all_combinations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    lists = "# @package _global_\ndefaults:\n  - debug\nhydra:\n  sweeper:\n    params:\n      lr: 3e-3,1e-3\n"
    (own / "mine.yaml").write_text(lists)
    line = ["--config-dir", "own", "experiment=mine", "run.max_steps=1", "run.evaluate=false", "logger={}"]
    assert lit_glm_here("train", *line, "hydra.run.dir=multirun/a/b") == 0  # lr as in the debug experiment
    assert lit_glm_here("train", "-m", *line) == 0, capfd.readouterr()
    (table,) = tmp_path.glob("multirun/*/*/sweep.csv")
    text = table.read_text()
    assert "lr=0.003" in text
    assert "lr=0.001" in text
    assert os.path.isdir("multirun")


@pytest.mark.slow
def test_folder_name_that_looks_like_an_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "\\${x:y}").mkdir()
    monkeypatch.chdir(tmp_path / "\\${x:y}")
    how = ["experiment=debug", "run.max_steps=1", "run.evaluate=false"]
    assert lit_glm_here("train", *how) == 0
    (run,) = Path("outputs").glob("*/*")
    assert lit_glm_here("evaluate", str(run)) == 0
    assert list(run.rglob("predictions.jsonl"))
    assert lit_glm_here("report", ".") == 0
    assert "finished" in capfd.readouterr().out
    assert lit_glm_here("train", "-m", *how, "seed=1") == 0
