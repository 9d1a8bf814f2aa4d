"""Runs a job: in this process for one device, as one torchrun for several, and says how it ended."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import psutil

from lit_glm.alone import alone_in
from lit_glm.bench.result import amend_result, begin_result, read_result
from lit_glm.errors import InputError, RunError
from lit_glm.jobs import heartbeat
from lit_glm.jobs.heartbeat import STALL_MARGIN_S, watch_this_process
from lit_glm.jobs.interrupts import EXIT_STATUS, Interrupted
from lit_glm.jobs.nodes import Node, check_nodes, interface_towards, this_node
from lit_glm.jobs.spec import Job
from lit_glm.jobs.worker import fail, run_rank
from lit_glm.orphans import die_with_parent

_GRACE_S = 40.0
_STALL_GRACE_S = 5.0
_LEAK = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
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
    world_size = job.config.topology.world_size
    check_nodes(job.config.topology)
    node = this_node(job.config.topology) if world_size > 1 else Node(0, "127.0.0.1", 0)
    if node.rank > 0:
        return _help(job, node, run_dir)
    with alone_in(run_dir) as lock:
        prepare_folder(job, run_dir)
        with ending_recorded(run_dir):
            if world_size == 1 and in_process:
                return _run_here(job, run_dir)
            run_ranks(job, node, run_dir, run_dir, lock=lock)
        result = read_result(run_dir)
    if result is None:
        raise RunError(f"{run_dir}: the job ended without a result")
    return result


@contextmanager
def ending_recorded(run_dir: Path) -> Iterator[None]:
    """Whatever ends the work inside, result.json says it."""
    try:
        yield
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


def _help(job: Job, node: Node, run_dir: Path) -> Dict[str, Any]:
    """Run the ranks of another node than the first: that one keeps the run folder, which both may share."""
    spec_dir = run_dir / "nodes" / str(node.rank)
    with alone_in(spec_dir) as lock:
        heartbeat.clear(spec_dir)
        job.write(spec_dir)
        run_ranks(job, node, spec_dir, run_dir, lock=lock)
    return {}


def _run_here(job: Job, run_dir: Path) -> Dict[str, Any]:
    limit = job.config.run.stall_timeout_s

    def say(whereabouts: List[str]) -> None:
        message = heartbeat.stalled(limit, run_dir, whereabouts)
        fail(run_dir, message)
        print(f"lit_glm: {message}", file=sys.stderr, flush=True)
        _kill(psutil.Process().children(recursive=True))

    end_watch = watch_this_process(run_dir, [0], limit + STALL_MARGIN_S, say)
    try:
        return run_rank(job, run_dir)
    finally:
        end_watch()


def prepare_folder(job: Job, run_dir: Path) -> None:
    """Leave the job in its folder, and take away what another run has left there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not job.resumes:
        _clear(run_dir)
        begin_result(run_dir, job.config)
    heartbeat.clear(run_dir)
    job.write(run_dir)


def _clear(run_dir: Path) -> None:
    """Checkpoints of another run must not be taken for this one's."""
    files = ("result.json", "steps.csv", "evals.csv", "memory.csv", "perf.log", "mlperf.log", "environment.json")
    for name in files:
        if (run_dir / name).exists():
            (run_dir / name).unlink()
    for name in ("checkpoints", "csv", "tensorboard", "mlruns", "wandb"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def clean_environment() -> Dict[str, str]:
    """The environment without what another job has left in it."""
    return {name: value for name, value in os.environ.items() if name not in _LEAK}


def _agent_command(job: Job, node: Node, spec_dir: Path, run_dir: Path, module: str) -> List[str]:
    topology = job.config.topology
    return [
        sys.executable,
        "-m",
        "lit_glm.jobs.agent",
        f"--nnodes={topology.num_nodes}",
        f"--nproc_per_node={topology.devices_per_node}",
        f"--node_rank={node.rank}",
        f"--master_addr={node.address}",
        f"--master_port={node.port}",
        f"--rdzv_conf=timeout={max(1, int(job.config.run.rendezvous_timeout_s))}",
        "--max_restarts=0",
        "-m",
        module,
        str(spec_dir),
        str(run_dir),
    ]


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def run_ranks(
    job: Job,
    node: Node,
    spec_dir: Path,
    run_dir: Path,
    module: str = "lit_glm.jobs.worker",
    margin_s: float = STALL_MARGIN_S,
    lock: Optional[int] = None,
) -> None:
    """Run all ranks of this node as one torchrun; forwards signals to it, and leaves nothing running.

    Args:
        job: how many ranks, and how long they may be silent.
        node: this one.
        spec_dir: holds job.json; where the ranks give signs of life.
        run_dir: where files go.
        module: what each rank runs, with the two folders as its arguments.
        margin_s: seconds beyond `run.stall_timeout_s` without a sign of life until the ranks are ended.
        lock: descriptor that keeps the run folder, as long as a rank may be at work there: if this process is killed
            its ranks take a moment to end.

    Raises:
        InputError, RunError, Interrupted: how it ended otherwise.
    """

    def stop(number: int, _frame: Any) -> None:
        raise _Stopped(number)

    environment = {**job.config.hardware.env, **clean_environment()}  # before a rank imports anything
    threads = max(1, (os.cpu_count() or 1) // job.config.topology.devices_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    interface = interface_towards(node.address) if job.config.topology.num_nodes > 1 else None
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)  # a host's own name often means the loopback to it
    before = {number: signal.signal(number, stop) for number in EXIT_STATUS}
    command = _agent_command(job, node, spec_dir, run_dir, module)
    held = () if lock is None else (lock,)
    agent = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
        pass_fds=held,
    )
    try:
        status = _wait(agent, job, node, spec_dir, run_dir, margin_s)
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


def _wait(
    agent: "subprocess.Popen[bytes]", job: Job, node: Node, spec_dir: Path, run_dir: Path, margin_s: float
) -> int:
    """Wait for the agent; end it when its ranks give no sign of life for too long."""
    limit = job.config.run.stall_timeout_s
    per_node = job.config.topology.devices_per_node
    ranks = range(node.rank * per_node, (node.rank + 1) * per_node)
    silence = heartbeat.Silence(spec_dir, ranks)
    while True:
        try:
            return agent.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            # Before the first sign the nodes are still meeting, which has a limit of its own.
            patience = limit if silence.begun() else max(limit, job.config.run.rendezvous_timeout_s)
            where = silence.stall(patience + margin_s)
            if where is not None:
                message = heartbeat.stalled(limit, run_dir, where)
                agent.send_signal(signal.SIGTERM)
                _end(agent, _STALL_GRACE_S)
                raise RunError(message) from None


def _end(agent: "subprocess.Popen[bytes]", grace_s: float = _GRACE_S) -> None:
    """Give the agent's processes time to end, then make them."""
    ranks = _children(agent.pid)
    try:
        agent.wait(timeout=grace_s if agent.poll() is None else 0)
    except subprocess.TimeoutExpired:
        pass
    _kill(ranks + _children(agent.pid))
    try:
        os.killpg(agent.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    agent.wait()


def _kill(processes: List[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            pass


def _children(pid: int) -> List[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
