"""The scripts that start a job on several nodes, and the one that tests the seed stack, with doubles around them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
ARGUMENTS = ["hardware=r300", "topology=2x8", "lr='1e-5'"]


def script(name: str, *arguments: str, cwd: Path, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", str(SCRIPTS / name), *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def started(name: str, *arguments: str, cwd: Path, **variables: str) -> Any:
    """What a script starts: a double of Python says its arguments and where it stands among the nodes."""
    double = cwd / "python_double.sh"
    double.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'import json, os, sys; print(json.dumps([sys.argv[1:], "
        '[os.environ.get(name) for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")]]))\' "$@"\n'
    )
    double.chmod(0o755)
    process = script(name, *arguments, cwd=cwd, PYTHON=str(double), **variables)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_launch_node(rank: str, tmp_path: Path) -> None:
    arguments, where = started("launch_node.sh", rank, "10.0.0.1", "29500", *ARGUMENTS, cwd=tmp_path)
    assert arguments == ["-m", "lit_glm.train", *ARGUMENTS]
    assert where == [rank, "10.0.0.1", "29500"]


def test_launch_node_without_arguments_prints_an_example(tmp_path: Path) -> None:
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
        "SLURM_STEP_NODELIST": "",
        "SLURM_NODEID": str(node),
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "2",
        "MASTER_PORT": "",
    }


@pytest.mark.parametrize("node", [0, 1])
def test_launch_slurm(node: int, tmp_path: Path) -> None:
    arguments, where = started("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **slurm(tmp_path, node))
    assert arguments == ["-m", "lit_glm.train", *ARGUMENTS, "hydra.run.dir=outputs/slurm-7.3"]
    assert where == [str(node), "127.0.0.1", str(20000 + 16 * 7 + 3)]


def test_slurm_step_on_some_nodes_uses_its_own_first_node(tmp_path: Path) -> None:
    part = {**slurm(tmp_path, 0), "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_STEP_NODELIST": "node[2-3]"}
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\n[ "$3" = "node[2-3]" ] && printf "node2\\nnode3\\n"\n')
    assert started("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **part)[1][1] == "node2"


def test_launch_slurm_keeps_the_run_dir_of_the_user(tmp_path: Path) -> None:
    arguments, _ = started("launch_slurm.sh", "hydra.run.dir=mine", cwd=tmp_path, **slurm(tmp_path, 0))
    assert arguments == ["-m", "lit_glm.train", "hydra.run.dir=mine"]


def test_launch_slurm_requires_one_task_per_node(tmp_path: Path) -> None:
    process = script("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **slurm(tmp_path, 0, tasks=16))
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert "16 tasks on 2 nodes: one task a node" in said


def test_launch_slurm_without_srun_is_rejected(tmp_path: Path) -> None:
    """The script of `sbatch --nodes=2` runs on the first node alone."""
    alone = {**slurm(tmp_path, 0, tasks=1), "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "", "SLURM_STEP_ID": ""}
    process = script("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **alone)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert "srun is missing" in said
    assert "--wrap 'srun --kill-on-bad-exit=1 bash scripts/launch_slurm.sh" in said


def test_launch_slurm_without_scontrol(tmp_path: Path) -> None:
    there = slurm(tmp_path, 1)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 127\n")
    process = script("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **there)
    assert "set MASTER_ADDR to the first node of node[0-1]" in process.communicate(timeout=20)[1]
    assert process.returncode == 2
    _, where = started("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **{**there, "MASTER_ADDR": "10.0.0.1"})
    assert where[:2] == ["1", "10.0.0.1"]
    one = {**there, "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0"}
    _, where = started("launch_slurm.sh", *ARGUMENTS, cwd=tmp_path, **one)
    assert where == [None, None, None]  # train takes a free port


def test_launch_slurm_outside_slurm(tmp_path: Path) -> None:
    process = script("launch_slurm.sh", cwd=tmp_path, SLURM_NODEID="")
    assert "start it with srun" in process.communicate(timeout=20)[1]
    assert process.returncode == 2


def test_seed_stack_that_is_not_run_is_reported(tmp_path: Path) -> None:
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path), "PYTHON38": "/nowhere"}
    process = script("test_seed_stack.sh", cwd=tmp_path, **bare)
    said = process.communicate(timeout=60)[1]
    if process.returncode != 3:  # a python3.8 of the system itself
        process.kill()
        return
    assert "NOT RUN: the seed stack" in said
