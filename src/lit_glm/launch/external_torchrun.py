"""`train` as one rank of a torchrun started by the user: starts no ranks; all ranks share one run folder."""

import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.launch.heartbeat import STALL_MARGIN_S, StallWatchdog, run_watchdog, stall_message
from lit_glm.launch.launcher import exit_interrupted, monitor_node_devices, record_run
from lit_glm.launch.peer_monitor import name_lost_peer
from lit_glm.launch.process_group import process_group
from lit_glm.launch.rendezvous import ExternalRank
from lit_glm.launch.signals import StopRequest
from lit_glm.launch.worker import run_and_report_errors
from lit_glm.process_utils import exit_now, kill_children, paused_gc, raise_open_files_limit
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import is_complete, mark_failed

log = logging.getLogger(__name__)

_FIRST_SPEAKS_S = 5.0


def _run_watchdog(config: TrainConfig, folder: Path, outer: ExternalRank) -> Any:
    """Exit this rank when no rank of its node sends heartbeats, as our supervisor would; torchrun then ends the others.

    The other ranks of a node wait longer than its first one, so that it reports the stall if it can.
    """

    def end_this(where: List[str]) -> None:
        message = stall_message(config, folder, where)
        mark_failed(folder, message)  # the node's first rank may be the one that hangs
        log.error(message)
        kill_children()
        os._exit(1)

    here = range(outer.rank - outer.local_rank, outer.rank - outer.local_rank + config.topology.devices_per_node)
    margin = STALL_MARGIN_S if outer.local_rank == 0 else STALL_MARGIN_S + _FIRST_SPEAKS_S
    return run_watchdog(StallWatchdog(folder, here, config.run.stall_timeout_s + margin), end_this)


def run_under_external_torchrun(
    config: TrainConfig,
    outer: ExternalRank,
    entry: float,
    command: List[str],
    find: Callable[[], Tuple[Path, bool]],
    composed: Dict[str, str],
    prepare_data: Callable[[], None],
) -> int:
    """Run this process as one rank of the user's torchrun.

    Args:
        config: configuration of the run.
        outer: rank of this process.
        entry: `time.monotonic()` at the entry of `train`.
        command: the command line.
        find: called on rank 0; returns the run folder and whether its run is resumed.
        composed: contents of the files in .hydra/.
        prepare_data: called on the first rank of each node, before any other rank reads data.

    Returns:
        The exit status.
    """
    with paused_gc():
        from lit_glm.hardware import object_collectives
        from lit_glm.launch.rank_runner import run_rank

    raise_open_files_limit()
    folder = Path(os.devnull)

    def work() -> None:
        nonlocal folder
        with ExitStack() as keep:
            keep.enter_context(stop.interruptible())
            if outer.local_rank == 0:
                prepare_data()
            peers = keep.enter_context(process_group(config)).peers
            told: Any = None
            if outer.rank == 0:
                run_dir, resumes = find()
                if resumes and is_complete(run_dir):
                    raise InputError(f"run.resume={run_dir}: the run is complete; nothing to do")
                keep.enter_context(record_run(JobSpec(config, entry, command, resumes), run_dir, composed))
                told = (str(run_dir.resolve()), resumes)
            if config.topology.world_size > 1:
                told = object_collectives.broadcast_object(
                    told, make_runtime(config.hardware, config.topology).device(outer.local_rank)
                )
            folder, resumes = Path(told[0]), told[1]
            job = JobSpec(config, entry if outer.rank == 0 else time.monotonic(), command, resumes)
            node = outer.rank // config.topology.devices_per_node
            if outer.local_rank == 0 and node > 0:
                keep.enter_context(monitor_node_devices(job, folder, node))
            with _run_watchdog(config, folder, outer), name_lost_peer(peers):
                run_rank(job, folder, stop)

    with StopRequest(config.run.shutdown_timeout_s, lambda *told: exit_interrupted(folder)(*told)) as stop:
        status = run_and_report_errors(work, lambda: folder, stop)
    if config.topology.world_size > 1:
        exit_now(status)
    return status
