"""Supervisor of one node's ranks: starts them, shuts them down in order, and determines how the job ended.

Every event enters one queue: a signal to this process, the exit of a rank, or missing heartbeats. The first event that
is not the success of a rank is the cause of the end; a killed rank takes precedence over the errors of its peers. Then
the other ranks receive SIGTERM, and SIGKILL after a grace period.
"""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional

from lit_glm.errors import InputError, RunError
from lit_glm.launch.heartbeat import STALL_MARGIN_S, StallWatchdog, last_heartbeat, run_watchdog, stall_message
from lit_glm.launch.rendezvous import Node, free_port, network_interface_to
from lit_glm.launch.signals import INTERRUPTED_STATUSES, SECOND_SIGINT_S, STOP_SIGNALS, Interrupted, StopSignals
from lit_glm.openmp import LAUNCHER_THREADS_VARIABLE, omp_env_for_ranks
from lit_glm.process_utils import kill_session, oom_kill_count, set_parent_death_signal
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import error_folder, report_killed_rank, report_silent_exit, root_cause

log = logging.getLogger(__name__)

_START_S = 30.0
"""Seconds to the first heartbeat of a rank on a busy machine: it imports torch and joins the others."""
_FAILURE_GRACE_S = 30.0
"""Seconds for the other ranks to exit when one has failed: one of them may be saving a checkpoint."""
_STALL_GRACE_S = 5.0
_JOB_VARIABLES = (
    *"MASTER_ADDR MASTER_PORT RANK LOCAL_RANK NODE_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE".split(),
    *"GROUP_WORLD_SIZE TORCHELASTIC_RUN_ID PL_GLOBAL_SEED PL_SEED_WORKERS LIT_GLM_SECRETS".split(),
    LAUNCHER_THREADS_VARIABLE,
)
"""Variables of one job that must not reach another."""


class TimeLimitExceeded(RunError):
    """End of a job whose time limit is over."""


@dataclass(frozen=True)
class Event:
    """Event that the supervisor handles."""

    kind: str
    """"signal", "exit", "stall" or "limit"."""
    rank: int = -1
    status: int = 0
    """Return code of a rank as in subprocess (negative after a signal), or the number of a signal."""
    reason: str = ""


class Supervisor(StopSignals):
    """Supervisor of one node's ranks. Enter it before anything that a signal must not interrupt, then call `run`."""

    def __init__(self) -> None:
        super().__init__()
        self.has_joined = False
        """Whether a rank of this node has completed the rendezvous."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ranks: Dict[int, subprocess.Popen[bytes]] = {}
        self._alive: Dict[int, subprocess.Popen[bytes]] = {}
        self._cause: Optional[Event] = None
        self._deadline: Optional[float] = None
        self._stopped_at = 0.0
        self._killed = False

    def on_signal(self, number: int) -> None:
        """Queue the signal; a handler that raises could interrupt any statement."""
        self._events.put(Event("signal", status=number))

    def run(
        self,
        job: JobSpec,
        node: Node,
        spec_dir: Path,
        lock: Optional[int] = None,
        module: str = "lit_glm.launch.worker",
        margin_s: float = STALL_MARGIN_S,
        output: Optional[Path] = None,
        limit_s: Optional[float] = None,
    ) -> None:
        """Run all ranks of this node until they exit; no process is left running.

        Args:
            job: the job, with the number of ranks and the timeouts.
            node: this node.
            spec_dir: folder with job.json and the heartbeats of the ranks; on node 0 the run folder.
            lock: descriptor of the run folder's lock, which the ranks inherit and hold even after this process exits.
            module: module that each rank runs, with that folder as its argument.
            margin_s: seconds beyond `run.stall_timeout_s` without a heartbeat until the ranks are terminated.
            output: file for the output of the ranks; None: that of this process.
            limit_s: seconds until the job is stopped; None: no limit.

        Raises:
            InputError, RunError, Interrupted: if the job did not end normally.
        """
        self._job, self._spec_dir = job, spec_dir
        topology, oom_kills = job.config.topology, oom_kill_count()
        first, count = node.rank * topology.devices_per_node, topology.devices_per_node * node.num_nodes_here
        limits = job.config.run
        # Before the first heartbeat, ranks are still starting or in the rendezvous, which has a timeout of its own.
        before_first_s = limits.rendezvous_timeout_s + _START_S + margin_s
        watchdog = StallWatchdog(
            spec_dir, range(first, first + count), limits.stall_timeout_s + margin_s, before_first_s
        )
        _print_rendezvous(job, node)
        timer = threading.Timer(limit_s or 0.0, self._events.put, (Event("limit"),))
        try:
            with run_watchdog(watchdog, self._on_stall):
                self._start_ranks(first, count, _job_env(job, node), [module, str(spec_dir)], lock, output)
                if limit_s is not None:
                    timer.start()
                while self._alive:
                    self._wait_for_event()
        finally:
            timer.cancel()
            self._kill()
            for process in self._ranks.values():
                process.wait()
            self.has_joined = last_heartbeat(spec_dir, range(first, first + count)) > 0
        self._raise_for_cause(oom_kill_count() > oom_kills)

    def _start_ranks(
        self,
        first: int,
        count: int,
        env: Dict[str, str],
        arguments: List[str],
        lock: Optional[int],
        output: Optional[Path],
    ) -> None:
        with nullcontext() if output is None else output.open("w", encoding="utf-8") as file:
            for rank in range(first, first + count):
                node_index, local_rank = divmod(rank, self._job.config.topology.devices_per_node)
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node_index)},
                    stdout=file,
                    stderr=None if file is None else subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only this process, which signals the ranks
                    preexec_fn=partial(set_parent_death_signal, signal.SIGTERM, os.getpid()),
                    pass_fds=() if lock is None else (lock,),
                )
                self._ranks[rank] = self._alive[rank] = process
                threading.Thread(target=self._wait_for_exit, args=(rank, process), daemon=True).start()

    def _wait_for_exit(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        self._events.put(Event("exit", rank, process.wait()))

    def _on_stall(self, traces: List[str]) -> None:
        self._events.put(Event("stall", reason=stall_message(self._job.config, error_folder(self._spec_dir), traces)))

    def _wait_for_event(self) -> None:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            event = self._events.get(timeout=left)
        except queue.Empty:
            self._print_late_ranks()
            self._kill()
            return
        if event.kind == "exit":
            process = self._alive.pop(event.rank)
            if event.status != 0:
                kill_session(process.pid)  # DataLoader workers left by a killed rank
                self._on_failure(event)
        elif event.kind == "signal":
            if self._cause is None:
                self._stop(event, self._job.config.run.shutdown_timeout_s)
            elif event.status == signal.SIGINT and time.monotonic() - self._stopped_at > SECOND_SIGINT_S:
                self._kill()  # a second Ctrl-C
        elif self._cause is None:
            self._stop(event, _STALL_GRACE_S if event.kind == "stall" else _FAILURE_GRACE_S)

    def _on_failure(self, event: Event) -> None:
        killed_by_other = (
            event.status < 0 and not self._killed and not (self._cause is not None and -event.status == signal.SIGTERM)
        )
        if killed_by_other:
            report_killed_rank(error_folder(self._spec_dir), event.rank, -event.status)
        elif event.status > 0 and self._cause is None and event.status not in INTERRUPTED_STATUSES:
            report_silent_exit(error_folder(self._spec_dir), event.rank, event.status)
        if self._cause is None:
            stopped = event.status in INTERRUPTED_STATUSES or -event.status in STOP_SIGNALS
            self._stop(event, self._job.config.run.shutdown_timeout_s if stopped else _FAILURE_GRACE_S)
        elif killed_by_other and self._cause.kind == "exit" and self._cause.status == 1:
            self._cause = event  # the earlier error is that of a peer that lost its connection to this rank

    def _stop(self, cause: Event, grace_s: float) -> None:
        self._cause, self._stopped_at = cause, time.monotonic()
        self._deadline = self._stopped_at + grace_s
        for process in self._alive.values():
            with suppress(ProcessLookupError):
                process.terminate()

    def _print_late_ranks(self) -> None:
        assert self._cause is not None
        if self._killed or self._cause.kind != "signal":
            return
        late = ", ".join(map(str, sorted(self._alive)))
        name, limit = signal.Signals(self._cause.status).name, self._job.config.run.shutdown_timeout_s
        log.error(
            f"rank{'s' * (len(self._alive) > 1)} {late} had not stopped {limit:g} s after {name} "
            f"(run.shutdown_timeout_s) and {'were' if len(self._alive) > 1 else 'was'} killed"
        )

    def _kill(self) -> None:
        self._deadline = None
        self._killed = True
        for process in self._alive.values():
            kill_session(process.pid)

    def _raise_for_cause(self, out_of_memory: bool) -> None:
        """Raise the error that corresponds to the cause; return after a success."""
        cause = self._cause
        if cause is None:
            return
        if cause.kind == "signal":
            if any(process.returncode for process in self._ranks.values()):
                raise Interrupted(cause.status)
            return  # the ranks had finished already
        if cause.kind == "stall":
            raise RunError(cause.reason)
        if cause.kind == "limit":
            raise TimeLimitExceeded("the time limit of the job is over")
        if cause.status in INTERRUPTED_STATUSES:
            raise Interrupted(cause.status - 128)
        if -cause.status in STOP_SIGNALS:
            raise Interrupted(-cause.status)
        reason = root_cause(error_folder(self._spec_dir))
        if cause.status == InputError.exit_status:
            raise InputError(reason or f"rank {cause.rank} rejected the job")
        message = f"rank {cause.rank} failed, see its error above ({error_folder(self._spec_dir)})"
        if out_of_memory and (reason is None or "was killed" in reason):
            message = f"{message}; out of memory: the kernel killed a process because the machine had no memory left"
            reason = "out of memory"
        raise RunError(message, summary=reason or message)


def _job_env(job: JobSpec, node: Node) -> Dict[str, str]:
    """Return the environment of a node's ranks: that of this process, rendezvous address and threads per rank."""
    topology = job.config.topology
    env = {
        **{name: value for name, value in os.environ.items() if name not in _JOB_VARIABLES},
        **job.secrets_variable(),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_WORLD_SIZE": str(topology.devices_per_node),
        "GROUP_WORLD_SIZE": str(topology.num_nodes),
        "MASTER_ADDR": node.address,
        "MASTER_PORT": str(node.port or free_port()),
        **omp_env_for_ranks(topology.devices_per_node * node.num_nodes_here),
    }
    interface = network_interface_to(node.address) if topology.num_nodes > 1 else None
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)  # a host often resolves its own name to the loopback
    return env


def _print_rendezvous(job: JobSpec, node: Node) -> None:
    """Print which nodes this one waits for, and at which address."""
    nodes, limit = job.config.topology.num_nodes, f"up to {job.config.run.rendezvous_timeout_s:g} s"
    if nodes == node.num_nodes_here:
        return
    others = "node 1" if nodes == 2 else f"nodes 1 to {nodes - 1}"
    action = f"node {node.rank} joins node 0" if node.rank > 0 else f"node 0 is waiting for {others}"
    log.info(f"{action} at {node.address}:{node.port} ({limit})")
