"""A run that is asked to stop: exit status, result and message agree, whatever it was doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest

from conftest import Process, command, lit_glm, start_command
from runs.processes import rank_processes
from runs.test_runs import _assert_no_process_left, _wait_for_steps, result

ENDLESS = ["experiment=debug", "run.max_steps=100000", "run.max_samples=10000000", "run.eval_interval_samples=1000000"]

SLOW = """
import time
from pytorch_lightning import Callback

class SlowSave(Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        if module.steps_done > 5:
            time.sleep(600)
"""


def start(tmp_path: Path, *arguments: str, topology: str = "1x1") -> Process:
    return start_command("train", *arguments, f"topology={topology}", "hydra.run.dir=run", cwd=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_stop_signal_saves_and_logs_how_to_resume(number: int, tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS)
    _wait_for_steps(tmp_path / "run", process, 5)
    process.send_signal(number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number
    final = result(tmp_path / "run")
    assert final["status"] == "interrupted"
    assert final["acc"] is None  # of step 0, not of the last
    step = final["global_steps"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}.ckpt").is_file()
    assert f"interrupted by {signal.Signals(number).name}; resume after step {step} with run.resume=" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_signal_to_one_rank_determines_the_exit_status(rank: int, tmp_path: Path) -> None:
    """The other rank, which stops with it, may be the first to exit."""
    process = start(tmp_path, *ENDLESS, topology="1x2")
    _wait_for_steps(tmp_path / "run", process, 5)
    rank_processes(process)[rank].send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=100)[1]
    assert (process.returncode, result(tmp_path / "run")["status"]) == (128 + signal.SIGUSR1, "interrupted"), said


@pytest.mark.slow
def test_run_stopped_in_the_last_evaluation_is_interrupted(tmp_path: Path) -> None:
    """The evaluation that was due was not made: the run goes on with it."""
    short = ["experiment=debug", "data.synthetic.num_eval=3000", "run.max_steps=6", "run.eval_interval_samples=1000000"]
    process = start(tmp_path, *short, "eval_bs=1")
    _wait_for_steps(tmp_path / "run", process, 6)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    final = result(tmp_path / "run")
    assert (process.returncode, final["status"], final["acc"], final["global_steps"]) == (143, "interrupted", None, 6)
    done = lit_glm("train", *short, "eval_bs=1", "run.resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    final = result(tmp_path / "run")
    assert (final["status"], final["global_steps"]) == ("finished", 6)
    assert final["acc"] is not None


@pytest.mark.parametrize("topology", ["1x1", pytest.param("1x2", marks=pytest.mark.slow)])
def test_save_is_aborted_after_the_shutdown_timeout(
    topology: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    more = ["+callbacks.slow._target_=slow.SlowSave", "run.checkpoint_interval_steps=5", "run.shutdown_timeout_s=2"]
    arguments = [*ENDLESS, *more, f"topology={topology}", "hydra.run.dir=run"]
    process = start_command("train", *arguments, cwd=tmp_path)
    _wait_for_steps(tmp_path / "run", process, 6)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 143
    assert "(run.shutdown_timeout_s)" in said
    assert "interrupted by SIGTERM" in said
    assert "resume after step 5 with run.resume=" in said
    assert result(tmp_path / "run")["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005.ckpt"]
    _assert_no_process_left(tmp_path / "run")


def limited(tmp_path: Path, soft: int, hard: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    script = f'ulimit -Sn {soft}; ulimit -Hn {hard}; exec "$@"'
    run: List[str] = ["bash", "-c", script, "limited", *command("train", *arguments, "hydra.run.dir=run")]
    return subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_a_low_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    done = limited(tmp_path, 64, 4096, "experiment=debug", "run.max_steps=3", "data.num_workers=2")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_limit_of_open_files_that_cannot_be_raised_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    done = limited(tmp_path, 64, 64, "experiment=debug", "run.max_steps=3", "data.num_workers=2")
    assert done.returncode == 1
    assert "a process may open 64 files here (ulimit -Hn), but data.num_workers=2 needs 256" in done.stderr
    assert "Traceback" not in done.stderr
    assert result(tmp_path / "run")["status"] == "failed"
    assert time.monotonic() - began < 150


INTERRUPTED_WHILE_READ = """
import os, signal
from omegaconf import OmegaConf
from lit_glm.launch.signals import Interrupted, StopRequest

OmegaConf.register_new_resolver("stopped", lambda: os.kill(os.getpid(), signal.SIGTERM) or "value")
node = OmegaConf.create({"a": "${stopped:}"})
try:
    with StopRequest(60.0, lambda *_: None) as stop, stop.interruptible():
        node.a
except Interrupted as error:
    print(error, error.exit_status)
"""


def test_interrupt_passes_through_omegaconf_error_handling() -> None:
    """OmegaConf makes each `Exception` anew, from a text, while a node is read."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_WHILE_READ], capture_output=True, text=True, check=False)
    assert done.stdout == "interrupted by SIGTERM 143\n", done.stderr


CLEANUP_FAILS = """
import os, signal, sys
from lit_glm.config.hydra_main import run_command
from lit_glm.config.schema import TrainConfig

def task(config, composed):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        saved = "value"
    finally:
        print(saved)  # not reached: the signal came before

sys.exit(run_command("train", TrainConfig, task))
"""


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"]])
def test_an_interrupt_passes_through_cleanup_that_fails(arguments: List[str], tmp_path: Path) -> None:
    """As in argparse, which restores in a `finally` what a signal has kept it from storing."""
    words = [sys.executable, "-c", CLEANUP_FAILS, "experiment=debug", f"hydra.sweep.dir={tmp_path}", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "lit_glm: interrupted by SIGINT\n"), done.stdout


DEAF = """
import hashlib, os, signal, sys, time
from lit_glm.launch.signals import StopRequest

def give_up(number, reason):
    print(number, reason, flush=True)
    os._exit(3)

with StopRequest(float(sys.argv[1]), give_up) as stop:
    stop.module = type("Module", (), {"stop_requested": False})()
    print("ready", flush=True)
    if sys.argv[2] == "library":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, outside the interpreter
    else:
        [time.sleep(1) for _ in range(60)]
"""


@pytest.mark.parametrize("where", ["python", "library"])
def test_process_that_does_not_stop_is_terminated(where: str) -> None:
    """Also where the main thread is inside a library that does not come back to the interpreter."""
    arguments = [sys.executable, "-c", DEAF, "0.5", where]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "15 has not stopped within 0.5 s (run.shutdown_timeout_s)\n"
    assert process.wait(timeout=60) == 3


def test_second_ctrl_c_terminates_a_blocked_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEAF, "600", "python"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "2 was terminated by a second Ctrl-C\n"
    assert process.wait(timeout=60) == 3
