"""What happens around a command: nobody reads its output, a session closes, a sweep is at work, a trial fails."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from conftest import command, lit_glm, lit_glm_here, rows, start_command
from lit_glm.runs.run_folder import lock_directory
from runs.test_runs import DEBUG, _start, _wait_for_steps, result
from runs.test_sweep import SWEEP, states


@pytest.mark.parametrize("topology", ["1x1", pytest.param("1x2", marks=pytest.mark.slow)])
def test_closed_stdout_does_not_stop_the_run(topology: str, tmp_path: Path) -> None:
    process = start_command("train", "experiment=debug", f"topology={topology}", "hydra.run.dir=run", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert result(tmp_path / "run")["status"] == "finished"
    assert "BrokenPipe" not in said


@pytest.mark.parametrize("ignored", [False, True])
def test_sighup_stops_the_run_unless_ignored(ignored: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if ignored:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to the command
        process = _start(tmp_path, run, "1x1", cold=True)
        signal.signal(signal.SIGHUP, before)
    else:
        process = _start(tmp_path, run, "1x1", "run.max_steps=4000", "run.eval_interval_samples=100000")
    _wait_for_steps(run, process, 9)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == (0 if ignored else 129)
    assert result(run)["status"] == ("finished" if ignored else "interrupted")
    assert len(list((run / "checkpoints").glob("step-*.ckpt"))) > 0


def test_logged_metrics_continue_after_kill_and_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(tmp_path, run, "1x1", "run.max_steps=60")
    _wait_for_steps(run, process, 22)
    process.kill()
    process.communicate()
    assert len(rows(run / "csv" / "metrics.csv")) > 2  # early points of a killed run
    final = lit_glm("train", *DEBUG, "run.max_steps=60", f"run.resume={run}", cwd=tmp_path)
    assert final.returncode == 0, final.stderr
    steps = [int(row["step"]) for row in rows(run / "csv" / "metrics.csv")]
    assert steps == sorted(set(steps))
    assert {0, 10, 20, 30, 40, 50, 60} <= set(steps)
    found = result(run)
    assert found["p_core"] >= found["p_train"] >= found["p_whole"]
    assert "(resumed 1x" in final.stdout


def test_second_sweep_in_the_same_folder_is_rejected(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "sweep" / "jobs"):
        done = lit_glm("train", *SWEEP, "bs=2,4", cwd=tmp_path)
    assert done.returncode == 2
    assert "; wait until that sweep has ended" in done.stderr
    assert not (tmp_path / "sweep" / "0").exists()


@pytest.mark.slow
def test_sweep_reuses_only_sweep_jobs_and_logs_them(tmp_path: Path) -> None:
    debug = ["experiment=debug", "run.max_steps=2", "logger={}"]
    assert lit_glm_here("train", *debug, "bs=2", f"hydra.run.dir={tmp_path}/outputs/a/b") == 0
    first = lit_glm("train", "-m", *debug, "bs=2,4", cwd=tmp_path)
    assert (first.returncode, first.stdout.count("reused from")) == (0, 0), first.stderr
    again = lit_glm("train", "-m", *debug, "bs=2,4", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("lit_glm: sweep: bs=2: complete, reused from multirun/") == 1
    assert "lit_glm: job " not in again.stdout
    assert again.stdout.count("(reused from ") == 2
    assert "lit_glm: best by acc" in again.stdout


FAILS = """
from pytorch_lightning import Callback

class Fails(Callback):
    def __init__(self, when):
        self.when = when
    def on_train_start(self, trainer, module):
        if self.when == "yes":
            raise ValueError("no chalk")
"""


@pytest.mark.slow
def test_optuna_search_continues_after_a_failed_trial(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    (tmp_path / "fails.py").write_text(FAILS)
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.sampler.seed=1",
    ]
    fails = ["+callbacks.f.when=choice(yes,no)", "+callbacks.f._target_=fails.Fails"]
    done = lit_glm("train", *SWEEP, *search, *fails, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert {status for _, status in states(tmp_path)} == {"failed", "finished"}
    assert "lit_glm: best by acc" in done.stdout
    assert (tmp_path / "sweep" / "optimization_results.yaml").is_file()


def test_unknown_sweep_objective_is_rejected(tmp_path: Path) -> None:
    done = lit_glm("train", *SWEEP, "bs=2,4", "sweep.objective=nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "sweep.objective=nonsense: must be one of acc, p_core" in done.stderr
    assert not (tmp_path / "sweep").exists()


ADDRESSES = """
import lit_glm.launch.rank_runner
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmPeak")))
"""


@pytest.mark.slow
def test_host_out_of_memory_is_reported(tmp_path: Path) -> None:
    """The kernel gives this process 700 MiB of addresses more than its libraries take; gradients and Adam want more."""
    taken = subprocess.run([sys.executable, "-c", ADDRESSES], stdout=subprocess.PIPE, text=True, check=True)
    shape = ["model.hidden_size=512", "model.num_layers=4", "model.vocab_size=60000", "bs=4", "run.max_steps=2"]
    limited = ["bash", "-c", f'ulimit -v {int(taken.stdout) + 700 * 1024}; exec "$@"', "limited"]
    train: Any = command("train", "experiment=debug", *shape, "logger={}", "hydra.run.dir=run")
    done = subprocess.run([*limited, *train], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "lit_glm: out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error"] == "out of memory"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["train", "experiment=debug", "bs=2", "hydra.run.dir=/proc/nowhere/run"], "/proc/nowhere/run"),
        (["train", "-m", "experiment=debug", "bs=2,4", "hydra.sweep.dir=/proc/nowhere"], "/proc/nowhere/jobs"),
        (["plan", "hardware=r300", "hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
        (["verify", "precision=fp32", "hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
        (["tune", "experiment=debug", "hydra.run.dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_folder_that_cannot_be_created_is_rejected(command: List[str], what: str, tmp_path: Path) -> None:
    done = lit_glm(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"{what}: the folder cannot be created" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
def test_unwritable_stdout_does_not_stop_the_run(redirection: str, tmp_path: Path) -> None:
    def shell(line: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, **variables}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    train = f"{sys.executable} -m lit_glm.train experiment=debug run.max_steps=2 hydra.run.dir=run {redirection}"
    done = shell(train)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    report = shell(f"{sys.executable} -m lit_glm.report run {redirection}")
    assert report.returncode == 2
    assert "give --out DIR" in report.stderr
    assert "Traceback" not in done.stderr + report.stderr
    chinese = shell(f"{sys.executable} -m lit_glm.report run --lang zh", PYTHONIOENCODING="ascii")
    assert chinese.returncode == 0, chinese.stderr
    assert "\\u" in chinese.stdout


@pytest.mark.slow
def test_optuna_search_with_database_storage(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    how = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=s"]
    how += ["hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1", "sweep.objective=p_core", "experiment=debug"]
    for trials in (1, 2):  # a study goes on after a restart
        done = lit_glm("train", *how, "run.max_steps=2", "bs=choice(2,4)", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with sqlite3.connect(tmp_path / "study.db") as study:
            assert study.execute("select count(*) from trials").fetchall() == [(trials,)]
            assert study.execute("select direction from study_directions").fetchall() == [("MAXIMIZE",)]
    wrong = lit_glm("train", *how, "hydra.sweeper.direction=minimize", "bs=choice(2,4)", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "a higher value of sweep.objective=p_core is better; leave the direction out" in wrong.stderr
    failed = lit_glm("train", *how[:3], "hydra.sweeper.study_name=t", *how[4:], "bs=choice(2000,4000)", cwd=tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert "no job succeeded" in failed.stderr
    assert "Traceback" not in failed.stderr
