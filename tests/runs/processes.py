"""Starts ranks and nodes as real processes, and finds them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import psutil

from conftest import GOLDEN_RUN, Process, command, start_command

FOUR_CARDS = [*GOLDEN_RUN, "hardware=r300", "hardware.runtime=simulated", "bs=2", "run.max_steps=4"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node_env(rank: int, address: str, port: int) -> Dict[str, str]:
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port), "NODE_RANK": str(rank)}


def start(arguments: List[str], env: Dict[str, str], cwd: Path, *before: str) -> Process:
    if not before:
        return start_command("train", *arguments, cwd=cwd, env=env)
    return subprocess.Popen(
        [*before, *command("train", *arguments)],
        env={**os.environ, **env},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_processes(process: Process) -> List[psutil.Process]:
    """The worker processes of a job, first rank first."""
    children = psutil.Process(process.pid).children(recursive=True)
    found = {}
    for child in children:
        try:
            if (
                child.ppid() == process.pid and "lit_glm.launch.worker" in child.cmdline()
            ):  # loaders are ranks' children
                found[int(child.environ()["RANK"])] = child
        except psutil.Error:  # a short command of a rank's, which has ended
            continue
    return [found[rank] for rank in sorted(found)]


def start_torchrun(*arguments: str, ranks: int, cwd: Path) -> "subprocess.Popen[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    where = ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", "lit_glm.train"]
    return subprocess.Popen(
        [*launcher, *where, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*arguments: str, ranks: int, cwd: Path) -> "subprocess.CompletedProcess[str]":
    process = start_torchrun(*arguments, ranks=ranks, cwd=cwd)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
