"""The scripts that start a job on several nodes, and the one that tests the seed stack, with doubles around them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

from conftest import GOLDEN_RUN
from parity.test_training import check_trajectory
from runs.processes import free_port

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
TWO_NODES = [*GOLDEN_RUN, "topology.num_nodes=2", "topology.devices_per_node=1"]


def script(name: str, *arguments: str, cwd: Path, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", str(SCRIPTS / name), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def finish(processes: List[Any]) -> List[Any]:
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def test_launch_node(tmp_path: Path) -> None:
    where = ["127.0.0.1", str(free_port())]
    finish(
        [script("launch_node.sh", rank, *where, *TWO_NODES, "hydra.run.dir=run", cwd=tmp_path) for rank in ("0", "1")]
    )
    check_trajectory(tmp_path / "run", "tanh", 2)


def test_launch_node_says_how(tmp_path: Path) -> None:
    process = script("launch_node.sh", "0", cwd=tmp_path)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert "launch_node.sh 1 10.0.0.1 29500 hardware=r300 topology=2x8" in said


def slurm(tmp_path: Path, node: int, tasks: int = 2) -> Dict[str, str]:
    """A double of what Slurm gives a task, and of its scontrol."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    tool = folder / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf "127.0.0.1\\n127.0.0.2\\n"\n')
    tool.chmod(0o755)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "3",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NODEID": str(node),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "2",
        "MASTER_PORT": "",
    }


def test_launch_slurm(tmp_path: Path) -> None:
    port = str(free_port())
    tasks = [{**slurm(tmp_path, node), "MASTER_PORT": port} for node in (0, 1)]
    finish([script("launch_slurm.sh", *TWO_NODES, cwd=tmp_path, **variables) for variables in tasks])
    check_trajectory(tmp_path / "outputs" / "slurm-7.3", "tanh", 2)


def test_launch_slurm_wants_one_task_a_node(tmp_path: Path) -> None:
    process = script("launch_slurm.sh", *TWO_NODES, cwd=tmp_path, **slurm(tmp_path, 0, tasks=16))
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert "16 tasks on 2 nodes: one task a node" in said


def test_launch_slurm_outside_slurm(tmp_path: Path) -> None:
    process = script("launch_slurm.sh", cwd=tmp_path, SLURM_NODEID="")
    assert "start it with srun" in process.communicate(timeout=20)[1]
    assert process.returncode == 2


def test_the_seed_stack_is_reported_where_it_is_not_run(tmp_path: Path) -> None:
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path), "PYTHON38": "/nowhere"}
    process = script("test_seed_stack.sh", cwd=tmp_path, **bare)
    said = process.communicate(timeout=60)[1]
    if process.returncode != 3:  # a python3.8 of the system itself
        process.kill()
        return
    assert "NOT RUN: the seed stack" in said
