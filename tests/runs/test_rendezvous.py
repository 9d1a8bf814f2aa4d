"""Several ranks and nodes as real processes: they meet, and they agree with fewer."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

import pytest
import torch

from conftest import GOLDEN_RUN, Process, lit_glm, lit_glm_here, rows
from parity.test_training import check_trajectory
from runs.processes import FOUR_CARDS, free_port, node_env, start, torchrun
from runs.test_runs import DEBUG, _assert_no_process_left, result


@pytest.mark.slow
def test_two_nodes_with_two_devices_equal_one_device(tmp_path: Path) -> None:
    port = free_port()
    two = [*FOUR_CARDS, "topology.num_nodes=2", "topology.devices_per_node=2", f"hydra.run.dir={tmp_path / 'two'}"]
    second = start(two, node_env(1, "127.0.0.1", port), tmp_path)
    first = start(two, node_env(0, "127.0.0.1", port), tmp_path)
    outputs = [process.communicate(timeout=240) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    alone = ["hardware.gelu=erf", "bs=8", f"hydra.run.dir={tmp_path / 'one'}"]  # the same global batch
    assert lit_glm_here("train", *GOLDEN_RUN, "run.max_steps=4", *alone) == 0
    names = ("step", "samples", "loss", "lr", "grad_norm")
    for ours, theirs in zip(rows(tmp_path / "two" / "steps.csv"), rows(tmp_path / "one" / "steps.csv")):
        assert [float(ours[name]) for name in names] == pytest.approx([float(theirs[name]) for name in names], rel=1e-5)
    assert result(tmp_path / "two")["topology"] == "2x2"
    assert result(tmp_path / "two")["acc"] == result(tmp_path / "one")["acc"]


@pytest.mark.slow
def test_two_hosts_match_the_golden_trajectory(two_hosts: List[str], tmp_path: Path) -> None:
    """The golden two-rank trajectory, one rank a host."""
    arguments = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1", f"hydra.run.dir={tmp_path}/run"]
    processes = [
        start(arguments, node_env(rank, "10.77.0.1", 29511), tmp_path, "ip", "netns", "exec", two_hosts[rank])
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_trajectory(tmp_path / "run", "tanh", 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rendezvous_timeout_error_names_the_address(rank: int, tmp_path: Path) -> None:
    port = free_port()
    arguments = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1", "run.rendezvous_timeout_s=4"]
    alone = start([*arguments, f"hydra.run.dir={tmp_path}/run"], node_env(rank, "127.0.0.1", port), tmp_path)
    began = time.monotonic()
    said = alone.communicate(timeout=90)[1]
    assert alone.returncode == 1
    assert f"rendezvous failed on node {rank}" in said
    assert f"2 nodes were expected at 127.0.0.1:{port} (run.rendezvous_timeout_s, 4 s)" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 60
    _assert_no_process_left(tmp_path / "run")


TWO = ["experiment=debug", "topology.num_nodes=2", "topology.devices_per_node=1", "run.max_steps=4"]


CONNECTS, LISTENS = "rank 1 connects to", "rank 0 listens on"


def start_node(rank: int, port: int, tmp_path: Path, *arguments: str, **env: str) -> Process:
    """Start a node that says when its rank looks for the others: a node that ends tells them for 20 seconds only."""
    return start([*TWO, *arguments], {**node_env(rank, "127.0.0.1", port), "LIT_GLM_LOG": "DEBUG", **env}, tmp_path)


def wait_for_output(process: Process, text: str) -> None:
    assert process.stdout is not None
    while text not in process.stdout.readline():
        assert process.poll() is None


def both(tmp_path: Path, *arguments: str, delay_s: Optional[float] = None) -> "tuple[List[int], List[str]]":
    """Exit statuses and outputs of two nodes.

    The second one starts `delay_s` after the first; None: the first starts when the second looks for it.
    """
    port = free_port()
    if delay_s is None:
        second = start_node(1, port, tmp_path, *arguments)
        wait_for_output(second, CONNECTS)
        first = start_node(0, port, tmp_path, *arguments)
    else:
        first = start_node(0, port, tmp_path, *arguments)
        time.sleep(delay_s)
        second = start_node(1, port, tmp_path, *arguments)
    outputs = ["".join(node.communicate(timeout=300)) for node in (first, second)]
    return [first.returncode, second.returncode], outputs


@pytest.mark.slow
def test_node_0_decides_which_run_is_resumed(tmp_path: Path) -> None:
    """The second node starts when the first has the folder, and finds nothing by itself."""
    statuses, outputs = both(tmp_path, delay_s=0.0)
    assert statuses == [0, 0], outputs
    (run,) = (path.parent for path in tmp_path.rglob("result.json"))
    (run / "result.json").write_text(json.dumps({**result(run), "status": "interrupted"}))
    statuses, outputs = both(tmp_path, "run.resume=auto", delay_s=5.0)
    assert statuses == [0, 0], outputs
    assert "resuming after step 4" in outputs[0]
    assert [path.parent for path in tmp_path.rglob("job.json")] == [run]
    assert result(run)["interruptions"] == 1
    statuses, outputs = both(tmp_path, f"run.resume={run}")  # complete: nobody waits for any_rank
    assert statuses == [0, 0], outputs
    assert "node 0 exited before the rendezvous completed: the run is complete" in outputs[1]


@pytest.mark.slow
def test_node_reports_the_input_error_of_the_other_node(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.csv").write_text("dear")
    statuses, outputs = both(tmp_path, f"hydra.run.dir={tmp_path / 'run'}")
    assert statuses == [2, 2], outputs
    assert "is not a run folder" in outputs[0]
    assert "node 0 exited before the rendezvous completed" in outputs[1]
    assert "is not a run folder" in outputs[1]
    assert (tmp_path / "run" / "steps.csv").read_text() == "dear"


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_node_does_not_wait_for_one_that_was_stopped(stopped: int, tmp_path: Path) -> None:
    port, folder = free_port(), f"hydra.run.dir={tmp_path / 'run'}"
    other = start_node(1 - stopped, port, tmp_path, folder)
    wait_for_output(other, LISTENS if stopped else CONNECTS)
    first = start_node(stopped, port, tmp_path, folder)
    wait_for_output(first, "node")  # it waits for the other, or joins it
    first.send_signal(signal.SIGTERM)
    outputs = ["".join(node.communicate(timeout=300)) for node in (first, other)]
    assert first.returncode == 143, outputs
    # Either it hears of the signal, or the first had joined it before and both end with their connection.
    assert other.returncode in (1, 143), outputs
    assert "Traceback" not in outputs[1]


@pytest.mark.slow
def test_node_with_failing_collectives_terminates_the_other_node(tmp_path: Path) -> None:
    """The other waits for it inside the collective library, where it hears nothing."""
    port, folder = free_port(), f"hydra.run.dir={tmp_path / 'run'}"
    nodes = [start_node(0, port, tmp_path, folder), start_node(1, port, tmp_path, folder, GLOO_SOCKET_IFNAME="no-such")]
    outputs = ["".join(node.communicate(timeout=600)) for node in nodes]  # less than run.stall_timeout_s
    assert [node.returncode for node in nodes] == [1, 1], outputs
    assert "rank 1 on " in outputs[0], outputs


def test_busy_port_is_reported_without_waiting(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        done = lit_glm("train", *GOLDEN_RUN, "topology=1x2", cwd=tmp_path, env={"MASTER_PORT": str(port)}, timeout=60)
    assert done.returncode == 2
    assert f"MASTER_PORT={port}: is in use on this machine" in done.stderr


@pytest.mark.slow
def test_nodes_with_different_commands_do_not_train_together(tmp_path: Path) -> None:
    port = free_port()
    two = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1"]
    processes = [
        start([*two, f"lr={lr}", f"hydra.run.dir={tmp_path}/{rank}"], node_env(rank, "127.0.0.1", port), tmp_path)
        for rank, lr in ((0, "1e-3"), (1, "2e-3"))
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode for process in processes), outputs
    assert any("a different configuration from rank 0" in said for _, said in outputs), outputs


@pytest.mark.slow
def test_torchrun_with_a_failing_node_reports_rendezvous_timeout(tmp_path: Path) -> None:
    """The agents meet first, without end; then the command of one node is wrong."""
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=0"]
    launcher += ["--rdzv_backend=static", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command = ["-m", "lit_glm.train", *TWO, "run.rendezvous_timeout_s=4", f"hydra.run.dir={tmp_path}/run"]
    first, second = (
        subprocess.Popen(
            [*launcher, f"--node_rank={rank}", *command, *wrong], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        for rank, wrong in enumerate(([], ["run.foo=1"]))
    )
    said = first.communicate(timeout=240)[1]
    second.communicate(timeout=240)
    assert first.returncode == 1
    assert f"2 nodes were expected at 127.0.0.1:{port} (run.rendezvous_timeout_s, 4 s)" in said


@pytest.mark.slow
def test_run_under_external_torchrun(tmp_path: Path) -> None:
    done = torchrun(*GOLDEN_RUN, "topology=1x2", "hydra.run.dir=run", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_trajectory(tmp_path / "run", "tanh", 2)
    assert not (tmp_path / "outputs").exists()
    again = torchrun(*GOLDEN_RUN, "topology=1x2", "run.resume=run", ranks=2, cwd=tmp_path)
    assert (again.returncode, again.stdout.count("the run is complete; nothing to do")) == (0, 1), again.stderr


def test_external_torchrun_of_another_size_is_rejected(tmp_path: Path) -> None:
    """A rank with the variables that torchrun gives to the second of two."""
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}
    done = lit_glm("train", *GOLDEN_RUN, "topology=1x4", cwd=tmp_path, env={**ranks, **address})
    assert done.returncode == 2
    assert "topology=1x4 has 4 ranks, 4 per node, but torchrun started 2, 2 per node" in done.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_no_process_group_for_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> None:
        raise AssertionError("a process group was opened")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    assert lit_glm_here("train", *DEBUG, "run.max_steps=2", f"hydra.run.dir={tmp_path}/run") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
