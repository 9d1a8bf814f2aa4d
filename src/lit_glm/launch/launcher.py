"""Runs a job: in this process for one device, as one torchrun for several, and says how it ended."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import psutil

from lit_glm.errors import InputError, RunError
from lit_glm.gc_pause import paused_gc
from lit_glm.hardware.device_monitor import monitor_devices, readings_file
from lit_glm.hardware.oom import oom_kill_count
from lit_glm.launch import heartbeat
from lit_glm.launch.heartbeat import STALL_MARGIN_S, StallWatchdog, run_watchdog, stall_message
from lit_glm.launch.nodes import Node, check_node_count, network_interface_to, resolve_node
from lit_glm.launch.signals import EXIT_STATUS, Interrupted, stop_signals
from lit_glm.metrics.energy import energy_metrics
from lit_glm.openmp import LAUNCHER_THREADS_VARIABLE, omp_env_for_ranks
from lit_glm.process_utils import GRACE_S, kill_children, set_parent_death_signal, terminate_tree
from lit_glm.runs.error_files import error_reason, report_killed_rank, root_cause, write_error_file
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.lock import lock_directory
from lit_glm.runs.result import mark_failed, read_result, update_result
from lit_glm.runs.run_folder import acquire_run_dir

_STALL_GRACE_S = 5.0
_START_S = 30.0
"""Seconds that a rank may need to its first sign of life beside other work: it imports torch and joins the others."""
_JOB_VARIABLES = (
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
    LAUNCHER_THREADS_VARIABLE,
)
"""Variables of one job that must not reach another."""


def run_job(job: JobSpec, run_dir: Path, composed: Dict[str, str], in_process: bool = True) -> Dict[str, Any]:
    """Run a job to its end.

    Args:
        job: what to do.
        run_dir: where its files go.
        composed: what .hydra/ is to hold.
        in_process: one device: run here rather than in a process of its own.

    Returns:
        Its result.

    Raises:
        InputError, RunError, Interrupted: how it ended otherwise; result.json says so too.
    """
    world_size = job.config.topology.world_size
    check_node_count(job.config.topology)
    node = _own_node(job) if world_size > 1 else Node(0, "127.0.0.1", 0)
    if node.rank > 0:
        return _run_secondary_node(job, node, run_dir)
    with acquire_run_dir(job, run_dir, composed) as lock, write_energy_metrics(job, run_dir), write_failure_status(
        run_dir, job.is_resume
    ):
        heartbeat.clear_heartbeats(run_dir)
        if world_size == 1 and in_process:
            _run_in_process(job, run_dir)
        else:
            run_torchrun(job, node, run_dir, run_dir, lock=lock)
    result = read_result(run_dir)
    if result is None:
        raise RunError(f"{run_dir}: the job ended without a result")
    return result


def _own_node(job: JobSpec) -> Node:
    return resolve_node(job.config.topology, job.config.hardware.runtime == "simulated")


@contextmanager
def monitor_node_devices(job: JobSpec, run_dir: Path, node: int) -> Iterator[None]:
    """The cards of a node are read inside; times go on where an earlier part of the run has ended."""
    file, before = readings_file(run_dir, node), (read_result(run_dir) or {}) if job.is_resume else {}
    if not job.is_resume and file.exists():
        file.unlink()  # of a run that has been thrown away: the first node's has gone with it
    begun = job.start_time - float(before.get("e2e_time") or 0.0)
    with monitor_devices(job.config.hardware, file, node, job.config.topology.devices_per_node, begun):
        yield


@contextmanager
def write_energy_metrics(job: JobSpec, run_dir: Path) -> Iterator[None]:
    """Monitor the devices of node 0 inside the block; afterwards write the energy of all nodes into the result."""
    try:
        with monitor_node_devices(job, run_dir, 0):
            yield
    finally:
        result = read_result(run_dir)
        if result is not None and result.get("training_spans") and readings_file(run_dir, 0).is_file():
            took = energy_metrics(run_dir, job.config, result["training_spans"], result.get("num_trained_samples"))
            update_result(run_dir, **took)
            if took["energy_j"] is not None:
                mean = f"{took['power_mean_w']:.0f} W on the average"
                print(f"lit_glm: {took['energy_j'] / 1000:.1f} kJ, {took['samples_per_joule']:.3g} samples/J, {mean}")


@contextmanager
def write_failure_status(run_dir: Path, is_resume: bool) -> Iterator[None]:
    """Record how the block ended in result.json and save the traceback of an unexpected error.

    A resumed run whose input is rejected keeps the status that it had: it is as resumable as before.
    """
    try:
        yield
    except Interrupted:
        result = read_result(run_dir)
        if result is not None and result.get("status") == "running":
            update_result(run_dir, status="interrupted")
        raise
    except KeyboardInterrupt:
        update_result(run_dir, status="interrupted")
        raise Interrupted(signal.SIGINT) from None
    except Exception as error:
        if isinstance(error, InputError) and is_resume:
            raise
        noted = root_cause(run_dir)
        if noted is None:
            write_error_file(run_dir, 0, error)
        mark_failed(run_dir, getattr(error, "summary", "") or noted or error_reason(error))
        raise


def _run_secondary_node(job: JobSpec, node: Node, run_dir: Path) -> Dict[str, Any]:
    """Run the ranks of another node than the first: that one keeps the run folder, which both may share."""
    spec_dir = run_dir / "nodes" / str(node.rank)
    with lock_directory(spec_dir) as lock:
        heartbeat.clear_heartbeats(spec_dir)
        job.write(spec_dir)
        with monitor_node_devices(job, run_dir, node.rank):
            run_torchrun(job, node, spec_dir, run_dir, lock=lock)
    return {}


def _run_in_process(job: JobSpec, run_dir: Path) -> None:
    with paused_gc():
        from lit_glm.launch.rank_runner import run_rank

    def end_all(where: List[str]) -> None:
        said = stall_message(job.config, run_dir, where)
        mark_failed(run_dir, said)
        print(f"lit_glm: {said}", file=sys.stderr, flush=True)
        kill_children()
        os._exit(1)

    with run_watchdog(StallWatchdog(run_dir, [0], job.config.run.stall_timeout_s + STALL_MARGIN_S), end_all):
        run_rank(job, run_dir)


def clean_env() -> Dict[str, str]:
    """The environment without what another job has left in it."""
    return {name: value for name, value in os.environ.items() if name not in _JOB_VARIABLES}


def _agent_command(job: JobSpec, node: Node, spec_dir: Path, run_dir: Path, module: str) -> List[str]:
    topology = job.config.topology
    rank = ["-m", module, str(spec_dir), str(run_dir)]
    if topology.world_size == 1:  # one rank has nobody to meet: an agent would import torch once more for nothing
        return [sys.executable, *rank]
    return [
        sys.executable,
        "-m",
        "lit_glm.launch.torchrun_agent",
        f"--nnodes={topology.num_nodes // node.num_nodes_here}",
        f"--nproc_per_node={topology.devices_per_node * node.num_nodes_here}",
        f"--node_rank={node.rank}",
        f"--master_addr={node.address}",
        f"--master_port={node.port}",
        f"--rdzv_conf=timeout={max(1, int(job.config.run.rendezvous_timeout_s))}",
        "--max_restarts=0",
        *rank,
    ]


def _rank_env(job: JobSpec, node: Node) -> Dict[str, str]:
    """Of the ranks: a chip's variables before anything is imported, and the share of the machine that a rank has."""
    environment = {**job.config.hardware.env, **clean_env()}
    if job.config.topology.world_size == 1:
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environment.update(omp_env_for_ranks(job.config.topology.devices_per_node * node.num_nodes_here))
    interface = network_interface_to(node.address) if job.config.topology.num_nodes > 1 else None
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)  # a host's own name often means the loopback to it
    return environment


def _print_rendezvous(job: JobSpec, node: Node) -> None:
    """Whom this node waits for, and where."""
    nodes, limit = job.config.topology.num_nodes, f"up to {job.config.run.rendezvous_timeout_s:g} s"
    if nodes == node.num_nodes_here:
        return
    others = "node 1" if nodes == 2 else f"nodes 1 to {nodes - 1}"
    what = f"node {node.rank} joins node 0" if node.rank > 0 else f"node 0 is waiting for {others}"
    print(f"lit_glm: {what} at {node.address}:{node.port} ({limit})", flush=True)


class _StopSignal(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def run_torchrun(
    job: JobSpec,
    node: Node,
    spec_dir: Path,
    run_dir: Path,
    module: str = "lit_glm.launch.worker",
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
        lock: descriptor that keeps the run folder as long as a rank may be at work there, after this process too.

    Raises:
        InputError, RunError, Interrupted: how it ended otherwise.
    """

    def stop(number: int, _frame: Any) -> None:
        raise _StopSignal(number)

    before, killed = {number: signal.signal(number, stop) for number in stop_signals()}, oom_kill_count()
    _print_rendezvous(job, node)
    command, environment = _agent_command(job, node, spec_dir, run_dir, module), _rank_env(job, node)
    agent = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
        pass_fds=() if lock is None else (lock,),
    )
    tree = psutil.Process(agent.pid)
    stalled: List[str] = []

    def end_silent(where: List[str]) -> None:
        stalled.append(stall_message(job.config, run_dir, where))
        terminate_tree(tree, _STALL_GRACE_S)

    try:
        with run_watchdog(_make_watchdog(job, node, spec_dir, margin_s), end_silent):
            status = agent.wait()
    except _StopSignal as stopped:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        terminate_tree(tree, GRACE_S)
        raise Interrupted(stopped.number) from None
    finally:
        if agent.poll() is None:
            terminate_tree(tree, GRACE_S)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stalled:
        raise RunError(stalled[0])
    if status < 0:  # only a rank without an agent ends so
        status = report_killed_rank(run_dir, 0, -status)
    _raise_for_status(status, spec_dir, run_dir, oom_kill_count() > killed)


def _make_watchdog(job: JobSpec, node: Node, spec_dir: Path, margin_s: float) -> StallWatchdog:
    run, per_node = job.config.run, job.config.topology.devices_per_node
    ranks = range(node.rank * per_node, (node.rank + node.num_nodes_here) * per_node)
    # Before the first sign the nodes are still meeting, which has a limit of its own, and then the ranks start.
    return StallWatchdog(
        spec_dir, ranks, run.stall_timeout_s + margin_s, run.rendezvous_timeout_s + _START_S + margin_s
    )


def _raise_for_status(status: int, spec_dir: Path, run_dir: Path, for_memory: bool) -> None:
    """Turn an agent's exit status into the error that it stands for; none for 0."""
    if status - 128 in list(EXIT_STATUS):
        raise Interrupted(status - 128)
    if status == InputError.exit_status:
        raise InputError("the ranks refused the job, see above")
    if status:
        reason = root_cause(spec_dir)
        said = f"the job failed with exit status {status}; the rank's error stands above ({run_dir})"
        if for_memory and (reason is None or "was killed" in reason):
            said = f"{said}; out of memory: the machine had none left, and the kernel has killed a process"
            reason = "out of memory"
        raise RunError(said, summary=reason or said)
