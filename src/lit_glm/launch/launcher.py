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
from lit_glm.gc_pause import importing
from lit_glm.hardware.device_monitor import devices_watched, file_of
from lit_glm.hardware.oom import kernel_kills
from lit_glm.launch import heartbeat
from lit_glm.launch.heartbeat import STALL_MARGIN_S, Watch, said_of, watching
from lit_glm.launch.nodes import Node, check_nodes, interface_towards, this_node
from lit_glm.launch.signals import EXIT_STATUS, Interrupted, stopping
from lit_glm.metrics.energy import energy
from lit_glm.openmp import OURS, for_ranks
from lit_glm.process_utils import GRACE_S, die_with_parent, end, kill_children
from lit_glm.runs.error_files import first_error, note_error, reason_of
from lit_glm.runs.job_spec import Job
from lit_glm.runs.lock import alone_in
from lit_glm.runs.result import amend_result, fail, read_result
from lit_glm.runs.run_folder import taken

_STALL_GRACE_S = 5.0
_START_S = 30.0
"""Seconds that a rank may need to its first sign of life beside other work: it imports torch and joins the others."""
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
    OURS,
)
"""Variables of one job that must not reach another."""


def run_job(job: Job, run_dir: Path, composed: Dict[str, str], in_process: bool = True) -> Dict[str, Any]:
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
    check_nodes(job.config.topology)
    node = _node(job) if world_size > 1 else Node(0, "127.0.0.1", 0)
    if node.rank > 0:
        return _help(job, node, run_dir)
    with taken(job, run_dir, composed) as lock, energy_recorded(job, run_dir), ending_recorded(run_dir):
        heartbeat.clear(run_dir)
        if world_size == 1 and in_process:
            _run_here(job, run_dir)
        else:
            run_ranks(job, node, run_dir, run_dir, lock=lock)
    result = read_result(run_dir)
    if result is None:
        raise RunError(f"{run_dir}: the job ended without a result")
    return result


def _node(job: Job) -> Node:
    return this_node(job.config.topology, job.config.hardware.runtime == "simulated")


@contextmanager
def node_watched(job: Job, run_dir: Path, node: int) -> Iterator[None]:
    """The cards of a node are read inside; times go on where an earlier part of the run has ended."""
    file, before = file_of(run_dir, node), (read_result(run_dir) or {}) if job.resumes else {}
    if not job.resumes and file.exists():
        file.unlink()  # of a run that has been thrown away: the first node's has gone with it
    begun = job.entry - float(before.get("e2e_time") or 0.0)
    with devices_watched(job.config.hardware, file, node, job.config.topology.devices_per_node, begun):
        yield


@contextmanager
def energy_recorded(job: Job, run_dir: Path) -> Iterator[None]:
    """As `node_watched` of the first node; what the cards of all nodes took stands in the result then."""
    try:
        with node_watched(job, run_dir, 0):
            yield
    finally:
        result = read_result(run_dir)
        if result is not None and result.get("training_spans") and file_of(run_dir, 0).is_file():
            took = energy(run_dir, job.config, result["training_spans"], result.get("num_trained_samples"))
            amend_result(run_dir, **took)
            if took["energy_j"] is not None:
                mean = f"{took['power_mean_w']:.0f} W on the average"
                print(f"lit_glm: {took['energy_j'] / 1000:.1f} kJ, {took['samples_per_joule']:.3g} samples/J, {mean}")


@contextmanager
def ending_recorded(run_dir: Path) -> Iterator[None]:
    """Whatever ends the work inside, result.json says it, and the folder has the traceback of an unexpected error."""
    try:
        yield
    except Interrupted:
        result = read_result(run_dir)
        if result is not None and result.get("status") == "running":
            amend_result(run_dir, status="interrupted")
        raise
    except KeyboardInterrupt:
        amend_result(run_dir, status="interrupted")
        raise Interrupted(signal.SIGINT) from None
    except Exception as error:
        noted = first_error(run_dir)
        if noted is None:
            note_error(run_dir, 0, error)
        fail(run_dir, getattr(error, "summary", "") or noted or reason_of(error))
        raise


def _help(job: Job, node: Node, run_dir: Path) -> Dict[str, Any]:
    """Run the ranks of another node than the first: that one keeps the run folder, which both may share."""
    spec_dir = run_dir / "nodes" / str(node.rank)
    with alone_in(spec_dir) as lock:
        heartbeat.clear(spec_dir)
        job.write(spec_dir)
        with node_watched(job, run_dir, node.rank):
            run_ranks(job, node, spec_dir, run_dir, lock=lock)
    return {}


def _run_here(job: Job, run_dir: Path) -> None:
    with importing():
        from lit_glm.launch.rank_runner import run_rank

    def end_all(where: List[str]) -> None:
        said = said_of(job.config, run_dir, where)
        fail(run_dir, said)
        print(f"lit_glm: {said}", file=sys.stderr, flush=True)
        kill_children()
        os._exit(1)

    with watching(Watch(run_dir, [0], job.config.run.stall_timeout_s + STALL_MARGIN_S), end_all):
        run_rank(job, run_dir)


def clean_environment() -> Dict[str, str]:
    """The environment without what another job has left in it."""
    return {name: value for name, value in os.environ.items() if name not in _LEAK}


def _agent_command(job: Job, node: Node, spec_dir: Path, run_dir: Path, module: str) -> List[str]:
    topology = job.config.topology
    return [
        sys.executable,
        "-m",
        "lit_glm.launch.torchrun_agent",
        f"--nnodes={topology.num_nodes // node.stands_for}",
        f"--nproc_per_node={topology.devices_per_node * node.stands_for}",
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


def _environment(job: Job, node: Node) -> Dict[str, str]:
    """Of the ranks: a chip's variables before anything is imported, and the share of the machine that a rank has."""
    environment = {**job.config.hardware.env, **clean_environment()}
    environment.update(for_ranks(job.config.topology.devices_per_node * node.stands_for))
    interface = interface_towards(node.address) if job.config.topology.num_nodes > 1 else None
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)  # a host's own name often means the loopback to it
    return environment


def _say_whom_it_meets(job: Job, node: Node) -> None:
    """Whom this node waits for, and where."""
    nodes, limit = job.config.topology.num_nodes, f"up to {job.config.run.rendezvous_timeout_s:g} s"
    if nodes == node.stands_for:
        return
    others = "node 1" if nodes == 2 else f"nodes 1 to {nodes - 1}"
    what = f"node {node.rank} joins node 0" if node.rank > 0 else f"node 0 is waiting for {others}"
    print(f"lit_glm: {what} at {node.address}:{node.port} ({limit})", flush=True)


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def run_ranks(
    job: Job,
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
        raise _Stopped(number)

    before, killed = {number: signal.signal(number, stop) for number in stopping()}, kernel_kills()
    _say_whom_it_meets(job, node)
    command, environment = _agent_command(job, node, spec_dir, run_dir, module), _environment(job, node)
    agent = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
        pass_fds=() if lock is None else (lock,),
    )
    tree = psutil.Process(agent.pid)
    stalled: List[str] = []

    def end_silent(where: List[str]) -> None:
        stalled.append(said_of(job.config, run_dir, where))
        end(tree, _STALL_GRACE_S)

    try:
        with watching(_watch(job, node, spec_dir, margin_s), end_silent):
            status = agent.wait()
    except _Stopped as stopped:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        end(tree, GRACE_S)
        raise Interrupted(stopped.number) from None
    finally:
        if agent.poll() is None:
            end(tree, GRACE_S)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stalled:
        raise RunError(stalled[0])
    _raise_of(status, spec_dir, run_dir, kernel_kills() > killed)


def _watch(job: Job, node: Node, spec_dir: Path, margin_s: float) -> Watch:
    run, per_node = job.config.run, job.config.topology.devices_per_node
    ranks = range(node.rank * per_node, (node.rank + node.stands_for) * per_node)
    # Before the first sign the nodes are still meeting, which has a limit of its own, and then the ranks start.
    return Watch(spec_dir, ranks, run.stall_timeout_s + margin_s, run.rendezvous_timeout_s + _START_S + margin_s)


def _raise_of(status: int, spec_dir: Path, run_dir: Path, for_memory: bool) -> None:
    """Turn an agent's exit status into the error that it stands for; none for 0."""
    if status - 128 in list(EXIT_STATUS):
        raise Interrupted(status - 128)
    if status == InputError.exit_status:
        raise InputError("the ranks refused the job, see above")
    if status:
        reason = first_error(spec_dir)
        said = f"the job failed with exit status {status}; the rank's error stands above ({run_dir})"
        if for_memory and (reason is None or "was killed" in reason):
            said = f"{said}; out of memory: the machine had none left, and the kernel has killed a process"
            reason = "out of memory"
        raise RunError(said, summary=reason or said)
