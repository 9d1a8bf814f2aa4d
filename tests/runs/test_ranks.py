"""Several ranks and nodes as real processes: they meet, they agree with fewer, and none outlives a failure."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import psutil
import pytest

from conftest import GOLDEN_RUN, command, lit_glm, rows
from lit_glm.alone import is_running
from parity.test_training import check_trajectory
from runs.test_runs import DEBUG, _nothing_left, _start, _wait_for_steps, result

FOUR_CARDS = [*GOLDEN_RUN, "hardware=r300", "hardware.runtime=simulated", "bs=2", "run.max_steps=4"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_node(rank: int, address: str, port: int) -> Dict[str, str]:
    return {**os.environ, "MASTER_ADDR": address, "MASTER_PORT": str(port), "NODE_RANK": str(rank)}


def start(arguments: List[str], env: Dict[str, str], cwd: Path, *before: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*before, *command("train", *arguments)],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(process: "subprocess.Popen[str]") -> List[psutil.Process]:
    """The worker processes of a job, first rank first."""
    children = psutil.Process(process.pid).children(recursive=True)
    found = {}
    for child in children:
        if child.status() == psutil.STATUS_ZOMBIE:  # a short command of a rank's
            continue
        line = child.cmdline()
        started_by = child.parent()
        by_agent = (
            started_by is not None and "lit_glm.jobs.agent" in started_by.cmdline()
        )  # loaders are ranks' children
        if "lit_glm.jobs.worker" in line and by_agent and "RANK" in child.environ():
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def test_two_nodes_of_two_cards_equal_one_of_four(tmp_path: Path) -> None:
    port = free_port()
    two = [*FOUR_CARDS, "topology.num_nodes=2", "topology.devices_per_node=2", f"hydra.run.dir={tmp_path / 'two'}"]
    second = start(two, on_node(1, "127.0.0.1", port), tmp_path)
    first = start(two, on_node(0, "127.0.0.1", port), tmp_path)
    outputs = [process.communicate(timeout=240) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    one = lit_glm("train", *FOUR_CARDS, "topology=1x4", f"hydra.run.dir={tmp_path / 'one'}", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    names = ("step", "samples", "loss", "lr", "grad_norm")
    for ours, theirs in zip(rows(tmp_path / "two" / "steps.csv"), rows(tmp_path / "one" / "steps.csv")):
        assert [float(ours[name]) for name in names] == pytest.approx([float(theirs[name]) for name in names])
    assert result(tmp_path / "two")["topology"] == "2x2"
    assert result(tmp_path / "two")["acc"] == result(tmp_path / "one")["acc"]


@pytest.fixture
def two_hosts() -> Any:
    """Two network namespaces with a cable between them: each sees its own loopback and the other's address."""
    names = [f"litglm{os.getpid()}a", f"litglm{os.getpid()}b"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{n + 1}/24 dev v{n}" for n, name in enumerate(names)),
        *(f"ip -n {name} link set {device} up" for n, name in enumerate(names) for device in ("lo", f"v{n}")),
    ]
    try:
        if shutil.which("ip") is None:
            pytest.skip("no program ip here: two hosts cannot be imitated")
        for line in commands:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"the kernel forbids network namespaces here: {line}: {done.stderr.strip()}")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_an_agent_each(two_hosts: List[str], tmp_path: Path) -> None:
    """The golden two-rank trajectory, one rank a host."""
    arguments = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1", f"hydra.run.dir={tmp_path}/run"]
    processes = [
        start(arguments, on_node(rank, "10.77.0.1", 29511), tmp_path, "ip", "netns", "exec", two_hosts[rank])
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_trajectory(tmp_path / "run", "tanh", 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_nobody_meets_says_where_it_waited(rank: int, tmp_path: Path) -> None:
    port = free_port()
    arguments = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1", "run.rendezvous_timeout_s=4"]
    alone = start([*arguments, f"hydra.run.dir={tmp_path}/run"], on_node(rank, "127.0.0.1", port), tmp_path)
    began = time.monotonic()
    said = alone.communicate(timeout=90)[1]
    assert alone.returncode == 1
    assert f"rendezvous failed on node {rank}" in said
    assert f"2 nodes were to meet at 127.0.0.1:{port} (run.rendezvous_timeout_s, 4 s)" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 60
    _nothing_left(tmp_path / "run")


def test_a_busy_port_is_said_not_waited_for(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        done = lit_glm("train", *GOLDEN_RUN, "topology=1x2", cwd=tmp_path, env={"MASTER_PORT": str(port)}, timeout=60)
    assert done.returncode == 2
    assert f"MASTER_PORT={port}: is in use on this machine" in done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_job(victim: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(tmp_path, run, "1x2", "run.max_steps=100000", "run.eval_interval_samples=100000")
    _wait_for_steps(run, process, 10)
    began = time.monotonic()
    ranks_of(process)[victim].kill()
    said = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 1, said
    assert f"rank {victim} was killed by SIGKILL" in said[1]
    _nothing_left(run)
    final = result(run)
    assert final["status"] == "failed"
    assert "exit status" in final["error"]
    assert len(rows(run / "steps.csv")) >= 10


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_job(victim: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["run.max_steps=100000", "run.eval_interval_samples=100000", "run.stall_timeout_s=5"]
    process = _start(tmp_path, run, "1x2", *more)
    _wait_for_steps(run, process, 10)
    began = time.monotonic()
    hanging = ranks_of(process)[victim]
    pid = hanging.pid
    hanging.send_signal(signal.SIGSTOP)
    said = process.communicate(timeout=80)
    assert time.monotonic() - began < 5 + 60
    assert process.returncode == 1, said
    assert "no progress for 5 s (run.stall_timeout_s)" in said[1]
    assert f"rank {victim} (process {pid}) is stopped" in said[1]
    assert f"rank {1 - victim}, innermost call first:" in said[1]
    assert "all_reduce" in said[1] or "backward" in said[1]
    _nothing_left(run)
    final = result(run)
    assert final["status"] == "failed"
    assert f"rank {victim} (process {pid}) is stopped" in final["error"]
    assert len(rows(run / "steps.csv")) >= 10


TWO_NODES = [*FOUR_CARDS[:-1], "topology.num_nodes=2", "topology.devices_per_node=2", "run.max_steps=100000"]


@pytest.mark.parametrize(("victim", "number"), [(3, signal.SIGKILL), (0, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_rank_that_ends_or_hangs_ends_both_nodes(victim: int, number: int, tmp_path: Path) -> None:
    port = free_port()
    more = ["run.eval_interval_samples=100000", "run.stall_timeout_s=15", f"hydra.run.dir={tmp_path / 'run'}"]
    nodes = [start([*TWO_NODES, *more], on_node(rank, "127.0.0.1", port), tmp_path) for rank in (0, 1)]
    _wait_for_steps(tmp_path / "run", nodes[0], 5)
    began = time.monotonic()
    ranks_of(nodes[victim // 2])[victim % 2].send_signal(number)
    outputs = [process.communicate(timeout=75)[1] for process in nodes]
    assert time.monotonic() - began < (60 if number == signal.SIGKILL else 15 + 60)
    assert [process.returncode for process in nodes] == [1, 1], outputs
    said = f"rank {victim} was killed by SIGKILL" if number == signal.SIGKILL else f"rank {victim} (process"
    assert said in outputs[victim // 2]
    _nothing_left(tmp_path / "run")
    assert result(tmp_path / "run")["status"] == "failed"
    assert len(rows(tmp_path / "run" / "steps.csv")) >= 5


def test_a_killed_command_keeps_its_folder_until_its_ranks_are_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(tmp_path, run, "1x2", "run.max_steps=5000")
    _wait_for_steps(run, process, 3)
    ranks = ranks_of(process)
    agent = ranks[0].parent()
    assert agent is not None
    agent.suspend()  # it passes no signal on
    try:
        process.kill()
        process.wait()
        assert all(rank.is_running() for rank in ranks)
        assert is_running(run)
    finally:
        agent.resume()
    psutil.wait_procs([agent, *ranks], timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert not is_running(run)


def test_nodes_with_different_commands_do_not_train_together(tmp_path: Path) -> None:
    port = free_port()
    two = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1"]
    processes = [
        start([*two, f"lr={lr}", f"hydra.run.dir={tmp_path}/{rank}"], on_node(rank, "127.0.0.1", port), tmp_path)
        for rank, lr in ((0, "1e-3"), (1, "2e-3"))
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode for process in processes), outputs
    assert any("another configuration than rank 0" in said for _, said in outputs), outputs


def torchrun(*arguments: str, ranks: int, cwd: Path) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    where = ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", "lit_glm.train"]
    return subprocess.run(
        [*launcher, *where, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )


def test_under_a_torchrun_of_the_users(tmp_path: Path) -> None:
    done = torchrun(*GOLDEN_RUN, "topology=1x2", "hydra.run.dir=run", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_trajectory(tmp_path / "run", "tanh", 2)
    assert not (tmp_path / "outputs").exists()


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


def test_the_error_of_the_rank_that_failed_is_on_the_screen(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    arguments = [*DEBUG, "topology=1x2", "+callbacks.mine._target_=mine.Raises", "hydra.run.dir=run"]
    done = lit_glm("train", *arguments, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "lit_glm: rank 1 failed:" in done.stderr
    assert "ValueError: out of chalk" in done.stderr
    assert result(tmp_path / "run")["status"] == "failed"
    assert len(rows(tmp_path / "run" / "steps.csv")) >= 2
    _nothing_left(tmp_path / "run")


def test_a_hang_under_a_torchrun_of_the_users_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: no collective notices, nor does torchrun."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    more = ["+callbacks.mine._target_=mine.Hangs", "run.stall_timeout_s=2", "hydra.run.dir=run"]
    done = torchrun(*DEBUG, *more, ranks=1, cwd=tmp_path)
    assert done.returncode != 0
    assert "no progress for 2 s (run.stall_timeout_s)" in done.stderr
    assert "mine.py" in done.stderr  # where it hangs
    assert result(tmp_path / "run")["status"] == "failed"


def test_a_torchrun_of_another_size_is_refused(tmp_path: Path) -> None:
    done = torchrun(*GOLDEN_RUN, "topology=1x4", ranks=2, cwd=tmp_path)
    assert done.returncode != 0
    assert "topology=1x4 is 4 ranks, 4 a node, but torchrun started 2, 2 a node" in done.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_no_process_group_for_one_device(tmp_path: Path) -> None:
    code = (
        "import sys, torch.distributed as d\n"
        "def refuse(*a, **k): raise SystemExit('a process group was opened')\n"
        "d.init_process_group = refuse\n"
        "from lit_glm.train import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *DEBUG, "run.max_steps=2", f"hydra.run.dir={tmp_path}/run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
