"""A rank that dies, fails or hangs ends its job on all nodes, and nothing outlives it."""

import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from conftest import lit_glm, rows
from lit_glm.runs.run_folder import is_running
from runs.processes import FOUR_CARDS, free_port, node_env, rank_processes, start, start_torchrun, torchrun
from runs.test_runs import DEBUG, _assert_no_process_left, _start, _wait_for_steps, result


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank_terminates_the_job(victim: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(tmp_path, run, "1x2", "run.max_steps=100000", "run.eval_interval_samples=100000")
    _wait_for_steps(run, process, 10)
    began = time.monotonic()
    rank_processes(process)[victim].kill()
    said = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 1, said
    assert f"rank {victim} was killed by SIGKILL" in said[1]
    _assert_no_process_left(run)
    final = result(run)
    assert final["status"] == "failed"
    assert final["error"] == f"rank {victim} was killed by SIGKILL"
    assert len(rows(run / "steps.csv")) >= 10


@pytest.mark.slow
def test_hanging_rank_terminates_the_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["run.max_steps=100000", "run.eval_interval_samples=100000", "run.stall_timeout_s=4"]
    process = _start(tmp_path, run, "1x2", *more)
    _wait_for_steps(run, process, 10)
    began = time.monotonic()
    hanging = rank_processes(process)[0]
    pid = hanging.pid
    hanging.send_signal(signal.SIGSTOP)
    said = process.communicate(timeout=80)
    assert time.monotonic() - began < 4 + 60
    assert process.returncode == 1, said
    assert "no progress for 4 s (run.stall_timeout_s)" in said[1]
    assert f"rank 0 (process {pid}) is stopped" in said[1]
    waits = said[1].split("rank 1, innermost call first:")[1]  # for the other: for its gradients, or at a checkpoint
    assert "backward" in waits or "distributed_c10d.py" in waits
    _assert_no_process_left(run)
    final = result(run)
    assert final["status"] == "failed"
    assert f"rank 0 (process {pid}) is stopped" in final["error"]
    assert len(rows(run / "steps.csv")) >= 10


TWO_NODES = [*FOUR_CARDS[:-1], "topology.num_nodes=2", "topology.devices_per_node=2", "run.max_steps=100000"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "victim", "number"), [(2, 3, signal.SIGKILL), (1, 1, signal.SIGSTOP)])
def test_killed_or_hanging_rank_terminates_both_nodes(devices: int, victim: int, number: int, tmp_path: Path) -> None:
    port = free_port()
    more = ["run.eval_interval_samples=100000", "run.stall_timeout_s=8", f"hydra.run.dir={tmp_path / 'run'}"]
    more += [f"topology.devices_per_node={devices}"]
    nodes = [start([*TWO_NODES, *more], node_env(rank, "127.0.0.1", port), tmp_path) for rank in (0, 1)]
    _wait_for_steps(tmp_path / "run", nodes[0], 5)
    began = time.monotonic()
    rank_processes(nodes[1])[victim % devices].send_signal(number)
    outputs = [process.communicate(timeout=75)[1] for process in nodes]
    assert time.monotonic() - began < (60 if number == signal.SIGKILL else 8 + 60)
    assert [process.returncode for process in nodes] == [1, 1], outputs
    said = f"rank {victim} was killed by SIGKILL" if number == signal.SIGKILL else f"rank {victim} (process"
    assert said in outputs[1]
    _assert_no_process_left(tmp_path / "run")
    assert result(tmp_path / "run")["status"] == "failed"
    assert len(rows(tmp_path / "run" / "steps.csv")) >= 5


@pytest.mark.slow
def test_interrupt_on_one_node_stops_both_nodes(tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        start(
            [*TWO_NODES, "topology.devices_per_node=1", f"hydra.run.dir={tmp_path / 'run'}"],
            node_env(rank, "127.0.0.1", port),
            tmp_path,
        )
        for rank in (0, 1)
    ]
    _wait_for_steps(tmp_path / "run", nodes[0], 5)
    nodes[1].send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=60)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [143, 130], outputs
    assert result(tmp_path / "run")["status"] == "interrupted"
    assert not any("Traceback" in said for said in outputs), outputs
    _assert_no_process_left(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_command_keeps_its_folder_until_its_ranks_are_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(tmp_path, run, "1x2", "run.max_steps=5000")
    _wait_for_steps(run, process, 3)
    ranks = rank_processes(process)
    for rank in ranks:
        rank.suspend()
    try:
        process.kill()
        process.wait()
        assert all(rank.is_running() for rank in ranks)
        assert is_running(run)
    finally:
        for rank in ranks:
            rank.resume()
    psutil.wait_procs(ranks, timeout=60)  # the kernel has told them
    assert not any(rank.is_running() for rank in ranks)
    assert not is_running(run)
    assert list((run / "checkpoints").glob("step-*.ckpt"))


MINE = """
import os, time
from pytorch_lightning import Callback

class Raises(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_rank == 1 and module.steps_done == 3:
            raise ValueError("out of chalk")

class Hangs(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if module.steps_done == 3:
            time.sleep(600)
"""


def test_error_of_the_failed_rank_is_printed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    arguments = [*DEBUG, "topology=1x2", "+callbacks.mine._target_=mine.Raises", "hydra.run.dir=run"]
    done = lit_glm("train", *arguments, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "lit_glm: rank 1 failed:" in done.stderr
    assert "ValueError: out of chalk" in done.stderr
    assert result(tmp_path / "run")["status"] == "failed"
    assert len(rows(tmp_path / "run" / "steps.csv")) >= 2
    _assert_no_process_left(tmp_path / "run")


@pytest.mark.slow
def test_hang_under_external_torchrun_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: no collective notices, nor does torchrun."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    more = ["+callbacks.mine._target_=mine.Hangs", "run.stall_timeout_s=2", "hydra.run.dir=run"]
    done = torchrun(*DEBUG, *more, ranks=1, cwd=tmp_path)
    assert done.returncode != 0
    assert "no progress for 2 s (run.stall_timeout_s)" in done.stderr
    assert "mine.py" in done.stderr  # where it hangs
    assert result(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "rank 0", "torchrun"])
def test_kill_under_external_torchrun_terminates_all_ranks(victim: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["topology=1x2", "run.max_steps=100000", "run.max_samples=10000000", f"hydra.run.dir={run}"]
    process = start_torchrun("experiment=debug", "run.eval_interval_samples=1000000", *more, ranks=2, cwd=tmp_path)
    _wait_for_steps(run, process, 5)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    (process if victim == "torchrun" else ranks[victim[-1]]).kill()
    said = process.communicate(timeout=120)[1]
    gone, alive = psutil.wait_procs(list(ranks.values()), timeout=120)
    assert not alive
    final = result(run)
    if victim == "rank 1":
        assert final["status"] == "failed"
        assert final["error"] == f"lost rank 1 on {socket.gethostname()}: killed or unreachable"
        assert f"lit_glm: rank 0: {final['error']}" in said
    elif victim == "rank 0":  # which owns the result
        assert final["status"] == "failed"
        assert any(text in final["error"] for text in ("lost rank 0", "rank 0 was killed"))
    else:
        assert final["status"] == "interrupted"  # the kernel has told the ranks, which have saved
        assert list((run / "checkpoints").glob("step-*.ckpt"))
