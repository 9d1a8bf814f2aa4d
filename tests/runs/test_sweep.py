"""A sweep runs each combination in a folder of its own, goes on after a failure, and runs nothing twice."""

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any, List

import pytest

from conftest import lit_glm, lit_glm_here, rows, start_command
from runs.test_runs import _assert_no_process_left
from runs_folder.test_lost_files import edit_environment

SWEEP = ["-m", "experiment=debug", "run.max_steps=3", "hydra.sweep.dir=sweep", "logger={}"]


def states(folder: Path) -> List[List[str]]:
    with (folder / "sweep" / "sweep.csv").open() as file:
        return [[row["fix_hp"], row["status"]] for row in csv.DictReader(file)]


def test_a_sweep_and_another_in_the_same_folder(tmp_path: Path) -> None:
    """One value asks for more nodes than there are, one is no number: what they make fails, the others run.

    A combination is known by its configuration: folder 0 is another's in the second sweep, which destroys nothing.
    """
    first = lit_glm("train", *SWEEP, "bs=2,abc,4", "topology=1x1,4x8", cwd=tmp_path)
    assert first.returncode == 2, first.stderr
    assert states(tmp_path) == [
        ["bs=2,lr=0.001", "finished"],  # the best first, in the order of the sweep where they are equal
        ["bs=4,lr=0.001", "finished"],
        ["bs=2,lr=0.001", "failed"],
        ["bs=abc,lr=0.001", "failed"],
        ["bs=abc,lr=0.001", "failed"],
        ["bs=4,lr=0.001", "failed"],
    ]
    assert [f"job {number} of 6: " in first.stdout for number in (1, 2, 5, 6)] == [True] * 4
    assert "\n1. " in first.stdout
    assert "topology=4x8 has 4 nodes" in first.stderr
    assert first.stdout.count("cpu 1x1") >= 4  # each run's own row, then the table over all
    assert "bs=abc: must be a whole number" in first.stderr
    assert "lit_glm: failed: bs=abc topology=1x1: bs=abc: must be a whole number" in first.stdout
    assert [first.stdout.count(f"| cpu {shape} (failed) | fp32 ") for shape in ("1x1", "4x8")] == [1, 3]
    assert (tmp_path / "sweep" / "sweep.md").read_text() in first.stdout
    results = [tmp_path / "sweep" / number / "result.json" for number in "04"]
    before = [path.read_bytes() for path in results]
    results[1].write_text(json.dumps({**json.loads(before[1]), "status": "running"}))
    again = lit_glm("train", *SWEEP, "bs=3,4,2", "topology=1x1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("complete, reused from") == 1
    assert "resuming after step 3" in again.stdout
    assert results[0].read_bytes() == before[0]
    assert json.loads(results[1].read_text())["status"] == "finished"
    assert states(tmp_path) == [[f"bs={bs},lr=0.001", "finished"] for bs in (3, 4, 2)]


@pytest.mark.slow
def test_hardware_env_of_a_sweep_job_does_not_affect_the_next(tmp_path: Path) -> None:
    done = lit_glm("train", *SWEEP, "topology=1x1", "+hardware.env.BKCL_PCIE_RING=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "sweep" / number / "environment.json").read_text()) for number in "01"]
    assert [environment["variables"]["BKCL_PCIE_RING"] for environment in found] == ["1", "2"]
    assert "(environment)" not in done.stderr


THREE = ["bs=2,3,4", "topology=1x1", "run.max_steps=40", "run.checkpoint_interval_steps=5"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """The killed sweep leaves one run complete and one unfinished; the next start runs what is left, nothing twice."""
    process = start_command("train", *SWEEP, *THREE, cwd=tmp_path, cold=True)
    second = tmp_path / "sweep" / "1" / "steps.csv"
    limit = time.monotonic() + 120
    while not (second.is_file() and second.read_bytes().count(b"\n") > 8):
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    _assert_no_process_left(tmp_path / "sweep")
    done = tmp_path / "sweep" / "0" / "result.json"
    before = done.read_bytes()
    assert json.loads(before)["status"] == "finished"
    assert not (tmp_path / "sweep" / "2").exists()

    again = lit_glm("train", *SWEEP, *THREE, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert done.read_bytes() == before
    assert again.stdout.count("complete, reused from") == 1
    assert again.stdout.count("resuming after step") == 1
    assert sorted(states(tmp_path)) == [[f"bs={bs},lr=0.001", "finished"] for bs in (2, 3, 4)]
    for number in "012":
        result = json.loads((tmp_path / "sweep" / number / "result.json").read_text())
        steps = [int(row["step"]) for row in rows(tmp_path / "sweep" / number / "steps.csv")]
        assert (steps, result["interruptions"]) == (list(range(1, 41)), int(number == "1"))
    assert len(list(tmp_path.rglob("job.json"))) == 3  # no child has run the sweep again
    assert [line[0] for line in (tmp_path / "sweep" / "sweep.md").read_text().splitlines()] == ["|"] * 5


@pytest.mark.slow
def test_swept_topologies_do_not_affect_each_other(tmp_path: Path) -> None:
    """1x2 before 1x1: variables of its ranks do not reach that."""
    done = lit_glm("train", *SWEEP, "bs=2", "topology=1x2,1x1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "sweep" / n / "result.json").read_text()) for n in "01"]
    assert [(r["topology"], r["status"]) for r in results] == [("1x2", "finished"), ("1x1", "finished")]


@pytest.mark.slow
def test_a_sweep_in_random_order_runs_each_combination(tmp_path: Path) -> None:
    """Which of them Hydra numbers how is not known before."""
    assert lit_glm("train", *SWEEP, "seed=1", cwd=tmp_path).returncode == 0
    done = lit_glm("train", *SWEEP, "seed=shuffle(1,2,3)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        seeds = sorted(row["overrides"].partition("seed=")[2][:1] for row in csv.DictReader(file))
    assert seeds == ["1", "2", "3"]


@pytest.mark.slow
def test_skip_done_can_be_switched_off(tmp_path: Path) -> None:
    """What is there is thrown away only if that is asked for."""
    run = ["experiment=debug", "run.max_steps=3", "logger={}", "bs=2", f"hydra.run.dir={tmp_path}/sweep/0"]
    assert lit_glm_here("train", *run) == 0
    before = (tmp_path / "sweep" / "0" / "result.json").read_bytes()
    (tmp_path / "sweep" / "jobs").mkdir()
    (tmp_path / "sweep" / "sweep.md").write_text("the table of an earlier sweep")
    again = lit_glm("train", *SWEEP, "bs=2", "topology=1x1", "sweep.skip_done=false", cwd=tmp_path)
    assert again.returncode == 2, again.stderr
    assert "sweep/0: already contains a run (status finished)" in again.stderr
    assert "or give another hydra.sweep.dir=\n" in again.stderr
    assert (tmp_path / "sweep" / "0" / "result.json").read_bytes() == before
    assert (tmp_path / "sweep" / "sweep.md").read_text() == "the table of an earlier sweep"
    over = ["sweep.skip_done=false", "run.overwrite=true"]
    third = lit_glm("train", *SWEEP, "bs=2", "topology=1x1", *over, cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert "reused from" not in third.stdout
    assert (tmp_path / "sweep" / "0" / "result.json").read_bytes() != before


def test_sweep_rejects_a_folder_with_foreign_job_records(tmp_path: Path) -> None:
    """Whatever lies in a folder of that name."""
    folder = tmp_path / "sweep" / "jobs"
    folder.mkdir(parents=True)
    for name in ("important.json", "00001.json"):
        (folder / name).write_text('{"mine": 1}')
    done = lit_glm("train", *SWEEP, "bs=2,4", cwd=tmp_path)
    assert (done.returncode, "contains files that are not job records" in done.stderr) == (2, True)
    assert {path.read_text() for path in folder.glob("*.json")} == {'{"mine": 1}'}


def test_sweep_rejects_a_folder_that_is_no_sweep_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.csv").write_text("dear")
    assert lit_glm_here("train", *SWEEP, "bs=2,4") == 2
    assert "sweep: is not a sweep folder (no jobs/) but contains sweep.csv" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.csv"]


def test_sweep_under_torchrun_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert lit_glm_here("train", *SWEEP, "bs=2,4") == 2
    assert "-m under torchrun: a sweep starts the ranks of its jobs itself" in capfd.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_parallel_sweep_jobs_with_joblib(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    plugin = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = lit_glm("train", *SWEEP, *plugin, "bs=2,4", "topology=1x1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == [["bs=2,lr=0.001", "finished"], ["bs=4,lr=0.001", "finished"]]


@pytest.mark.slow
def test_jobs_by_submitit(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    plugin = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = lit_glm("train", *SWEEP, *plugin, "bs=2,4", "topology=1x1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == [["bs=2,lr=0.001", "finished"], ["bs=4,lr=0.001", "finished"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "arguments", "status"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], 143),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"], 130),
    ],
)
def test_parallel_sweep_jobs_save_when_the_sweep_is_stopped(
    plugin: str, arguments: List[str], status: int, tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    endless = ["run.max_steps=1000000", "run.max_samples=100000000", "run.eval_interval_samples=100000000"]
    sweep = start_command("train", *SWEEP, *endless, *arguments, "bs=2,4", "topology=1x1", cwd=tmp_path)
    tables = [tmp_path / "sweep" / str(job) / "steps.csv" for job in range(2)]
    while not all(table.is_file() and table.read_text().count("\n") > 2 for table in tables):
        assert sweep.poll() is None
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == status, err
    assert states(tmp_path) == [["bs=2,lr=0.001", "interrupted"], ["bs=4,lr=0.001", "interrupted"]], out
    assert all(list(table.parent.glob("checkpoints/*.ckpt")) for table in tables)


@pytest.mark.slow
def test_a_search_by_optuna(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    plugin = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "sweep.objective=acc"]
    search = ["hydra.sweeper.direction=maximize", "lr=interval(0.0001,0.01)", "topology=1x1"]
    done = lit_glm("train", *SWEEP, *plugin, *search, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [status for _, status in states(tmp_path)] == ["finished"] * 3
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    results = [json.loads(path.read_text())["acc"] for path in (tmp_path / "sweep").glob("*/result.json")]
    assert f"best_value: {max(results)}" in best


@pytest.mark.slow
def test_a_sweep_does_not_take_results_of_another_machine(tmp_path: Path) -> None:
    sweep = [*SWEEP, "bs=2,4"]
    assert lit_glm("train", *sweep, cwd=tmp_path).returncode == 0
    edit_environment(tmp_path / "sweep" / "1", packages={"torch": "1.0"})
    before = (tmp_path / "sweep" / "1" / "result.json").read_bytes()
    for _ in range(2):  # measured anew once, in a folder beside it
        again = lit_glm("train", *sweep, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "sweep/1 is not reused: it was measured on another machine (torch 1.0, here " in again.stdout
        assert "sweep/1-" in (tmp_path / "sweep" / "sweep.csv").read_text()
    assert (tmp_path / "sweep" / "1" / "result.json").read_bytes() == before
    folders = sorted(path.name[:2] for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert folders == ["0", "1", "1-", "jo"]
