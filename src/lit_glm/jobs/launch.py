"""Runs a job: in this process for one device, as one torchrun for several, and says how it ended."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

from lit_glm.bench.result import amend_result, read_result
from lit_glm.errors import InputError, RunError
from lit_glm.jobs.spec import Job
from lit_glm.jobs.worker import EXIT_STATUS, Interrupted, fail, run_rank

_GRACE_S = 40.0
_LEAK = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "RANK",
    "GROUP_RANK",
    "LOCAL_WORLD_SIZE",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "HYDRA_FULL_ERROR",
)
"""Variables of one job that must not reach another."""


def run_job(job: Job, run_dir: Path, in_process: bool = True) -> Dict[str, Any]:
    """Run a job to its end.

    Args:
        job: what to do.
        run_dir: where its files go.
        in_process: one device: run here rather than in a process of its own.

    Returns:
        Its result.

    Raises:
        InputError, RunError, Interrupted: how it ended otherwise; result.json says so too.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if not job.resumes:
        _clear(run_dir)
    job.write(run_dir)
    world_size = job.config.topology.world_size
    try:
        if world_size == 1 and in_process:
            return run_rank(job, run_dir)
        _run_ranks(job, run_dir)
    except Interrupted:
        result = read_result(run_dir)
        if result is not None and result.get("status") == "running":
            amend_result(run_dir, status="interrupted")
        raise
    except (InputError, RunError) as error:
        fail(run_dir, str(error))
        raise
    except KeyboardInterrupt:
        amend_result(run_dir, status="interrupted")
        raise Interrupted(signal.SIGINT) from None
    except Exception as error:
        fail(run_dir, f"{type(error).__name__}: {error}")
        raise
    result = read_result(run_dir)
    if result is None:
        raise RunError(f"{run_dir}: the job ended without a result")
    return result


def _clear(run_dir: Path) -> None:
    """Take away what another run has left in the folder: its checkpoints must not be taken for this one's."""
    for name in ("result.json", "steps.csv", "evals.csv", "perf.log", "environment.json"):
        if (run_dir / name).exists():
            (run_dir / name).unlink()
    for name in ("checkpoints", "csv"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def clean_environment() -> Dict[str, str]:
    """The environment without what another job has left in it."""
    return {name: value for name, value in os.environ.items() if name not in _LEAK}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _agent_command(job: Job, run_dir: Path) -> List[str]:
    topology = job.config.topology
    address, port, node = "127.0.0.1", _free_port(), 0
    if topology.num_nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing:
            raise InputError(
                f"topology={topology.name} has {topology.num_nodes} nodes: type the same command on each node with "
                f"MASTER_ADDR, MASTER_PORT and NODE_RANK set (missing here: {', '.join(missing)}), "
                "or use scripts/launch_node.sh"
            )
        address, port, node = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["NODE_RANK"])
    return [
        sys.executable,
        "-m",
        "lit_glm.jobs.agent",
        f"--nnodes={topology.num_nodes}",
        f"--nproc_per_node={topology.devices_per_node}",
        f"--node_rank={node}",
        f"--master_addr={address}",
        f"--master_port={port}",
        "--max_restarts=0",
        "-m",
        "lit_glm.jobs.worker",
        str(run_dir),
    ]


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def _run_ranks(job: Job, run_dir: Path) -> None:
    """One torchrun; forwards signals to it, and leaves nothing running."""

    def stop(number: int, _frame: Any) -> None:
        raise _Stopped(number)

    environment = clean_environment()
    threads = max(1, (os.cpu_count() or 1) // job.config.topology.devices_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    before = {number: signal.signal(number, stop) for number in EXIT_STATUS}
    agent = subprocess.Popen(_agent_command(job, run_dir), env=environment, start_new_session=True)
    try:
        status = _wait(agent, job, run_dir)
    except _Stopped as stopped:
        for number in EXIT_STATUS:
            signal.signal(number, signal.SIG_IGN)
        agent.send_signal(signal.SIGTERM)
        _end(agent)
        raise Interrupted(stopped.number) from None
    finally:
        if agent.poll() is None:
            _end(agent)
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == EXIT_STATUS[signal.SIGTERM] or status == EXIT_STATUS[signal.SIGINT]:
        raise Interrupted(status - 128)
    if status == InputError.exit_status:
        raise InputError("the ranks refused the job, see above")
    if status:
        raise RunError(f"the job failed with exit status {status}; the rank's error stands above ({run_dir})")


def _wait(agent: "subprocess.Popen[bytes]", job: Job, run_dir: Path) -> int:
    """Wait for the agent; end it when nothing has been written for too long."""
    limit = job.config.run.stall_timeout_s
    watched = [run_dir / name for name in ("result.json", "steps.csv", "evals.csv", "perf.log", "environment.json")]
    started = time.time()
    while True:
        try:
            return agent.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            newest = max([started, *(path.stat().st_mtime for path in watched if path.exists())])
            if time.time() - newest > limit + 20.0:  # the collectives' own limit comes first and says more
                _end(agent)
                raise RunError(
                    f"no progress for {limit:g} s (run.stall_timeout_s): the job was ended ({run_dir})"
                ) from None


def _end(agent: "subprocess.Popen[bytes]") -> None:
    """Ask the agent's process group to end, then make it."""
    try:
        agent.wait(timeout=_GRACE_S if agent.poll() is None else 0)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(agent.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    agent.wait()
