"""A rank of a job: started by our supervisor (also under Slurm) or by a torchrun of the user.

Our supervisor starts `python -m lit_glm.launch.worker SPEC_DIR`. SPEC_DIR contains job.json and this node's heartbeats.
On node 0 it is the run folder, on other nodes a temporary folder: node 0 sends the path of the run folder at the
rendezvous. Under the user's torchrun each rank is a process of `train`, which calls `run_under_torchrun`.

`run_on_all_ranks` calls a function on all ranks, for `doctor` and `verify`.
"""

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from lit_glm.atomic_files import write_json
from lit_glm.config.schema import TrainConfig, train_config
from lit_glm.console import set_up_console
from lit_glm.errors import InputError, RunError
from lit_glm.launch.heartbeat import STALL_MARGIN_S, Heartbeat
from lit_glm.launch.launcher import exit_interrupted, monitor_node_devices, record_run, watch_for_stalls
from lit_glm.launch.process_group import process_group
from lit_glm.launch.rendezvous import NothingToDo, RendezvousError, RunFolder, is_known_to_all, resolve_node
from lit_glm.launch.signals import Interrupted, StopRequest, StopSignals
from lit_glm.launch.supervisor import Supervisor
from lit_glm.process_utils import exit_now, fast_imports, kill_children, raise_open_files_limit
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import (
    error_folder,
    error_reason,
    extend_times_to_end,
    mark_failed,
    read_result,
    root_cause,
    set_error_folder,
    write_error_file,
)
from lit_glm.runs.run_folder import complete_result, is_running

log = logging.getLogger("lit_glm.launch.worker")

_FIRST_RANK_REPORTS_S = 6.0
_FILE = "found.json"
_MARGIN_S = 3.0
_STALL_S = 30.0
"""Seconds from the rendezvous to the result: the first use of a collective library may take some."""


def main(spec_dir: Path) -> int:
    """Run this rank; turn errors into messages and an exit status."""
    set_up_console()
    job = JobSpec.read(spec_dir)
    rank, node = int(os.environ["RANK"]), int(os.environ["GROUP_RANK"])

    heartbeat = Heartbeat(spec_dir, rank)

    def joined(run: RunFolder) -> None:
        heartbeat()
        if spec_dir != run.path and os.environ["LOCAL_RANK"] == "0" and node > 0:
            set_error_folder(spec_dir, run.path / "nodes" / str(node))

    def work() -> None:
        try:
            _join_and_run(job, stop, lambda: RunFolder(spec_dir, job.is_resume), joined, heartbeat)
        except BaseException as error:
            if is_known_to_all(error):
                heartbeat()  # so that the supervisor does not announce the error
            raise

    with StopRequest(job.config.run.shutdown_timeout_s, exit_rank) as stop:
        return run_and_report_errors(work, lambda: error_folder(spec_dir), stop)


def _join_and_run(
    job: JobSpec,
    stop: StopRequest,
    choose_run: Callable[[], RunFolder],
    on_joined: Callable[[RunFolder], None],
    heartbeat: Optional[Heartbeat] = None,
) -> None:
    """Join the other ranks and run this rank's part of the job.

    Args:
        job: the job; whether it is resumed is decided by rank 0.
        stop: handler of the stop signals of this process.
        choose_run: see `process_group`.
        on_joined: called with the run folder when all ranks have joined.
        heartbeat: this rank's heartbeat; None: one in the run folder.
    """
    with ExitStack() as keep:
        keep.enter_context(stop.interruptible())
        with fast_imports(job.config):
            from lit_glm.launch.rank_runner import run_rank

        run = keep.enter_context(process_group(job.config, choose_run))
        assert run is not None
        if run.is_complete:
            raise NothingToDo(f"{run.path}: the run is complete; nothing to do")
        job.is_resume = run.is_resume
        on_joined(run)
        node = int(os.environ.get("GROUP_RANK", "0"))
        if os.environ["LOCAL_RANK"] == "0" and node > 0:
            keep.enter_context(monitor_node_devices(job, run.path, node))
        run_rank(job, run.path, stop, heartbeat)


def run_under_torchrun(job: JobSpec, run_dir: Path, files: Any) -> int:
    """Run this process as one rank of a torchrun that the user started.

    Args:
        job: the job.
        run_dir: folder for a new run.
        files: contents of the files in .hydra/.

    Returns:
        The exit status.
    """
    from lit_glm.data.memmap_dataset import prepare_data
    from lit_glm.runs.discovery import find_run_dir

    raise_open_files_limit()
    folder, rank, local_rank = Path(os.devnull), int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])

    def work() -> None:
        with ExitStack() as keep:  # left after the group of ranks, whose exit decides the status of the run

            def choose_run() -> RunFolder:
                path, job.is_resume = find_run_dir(job.config, run_dir)
                if job.is_resume and complete_result(path) is not None:
                    return RunFolder(path, True, is_complete=True)
                keep.enter_context(record_run(job, path, files))
                return RunFolder(path, job.is_resume)

            def joined(run: RunFolder) -> None:
                nonlocal folder
                folder = run.path
                keep.enter_context(_run_watchdog(job, folder, rank, local_rank))

            with stop.interruptible():
                if local_rank == 0:
                    prepare_data(job.config)  # before any other rank of the node reads data
            _join_and_run(job, stop, choose_run, joined)

    with StopRequest(job.config.run.shutdown_timeout_s, lambda *late: exit_interrupted(job, folder, *late)) as stop:
        status = run_and_report_errors(work, lambda: folder, stop)
    unfinished = (read_result(folder) or {}).get("status") == "running"
    if status == 1 and rank > 0 and unfinished and not is_running(folder):  # rank 0 was killed
        extend_times_to_end(folder, job.start_time)
        mark_failed(folder, root_cause(folder) or "rank 0 was killed")
    if job.config.topology.world_size > 1:
        exit_now(status)
    return status


def _run_watchdog(job: JobSpec, folder: Path, rank: int, local_rank: int) -> Any:
    """Exit this rank when no rank of its node sends heartbeats, as our supervisor would; torchrun then ends the others.

    The other ranks of a node wait longer than its first one, so that it reports the stall if it can.
    """
    first = rank - local_rank
    margin_s = STALL_MARGIN_S + (_FIRST_RANK_REPORTS_S if local_rank > 0 else 0)
    return watch_for_stalls(job, folder, range(first, first + job.config.topology.devices_per_node), margin_s)


def exit_rank(number: int, reason: str) -> None:
    """Exit a rank that did not stop in time after a signal; its supervisor reports how the job ended."""
    log.warning(f"rank {os.environ['RANK']} {reason}")
    kill_children()
    os._exit(128 + number)


def run_and_report_errors(work: Callable[[], None], error_dir: Callable[[], Path], stop: StopSignals) -> int:
    """Run a rank; print an error once and write it to the error file.

    Args:
        work: function that the rank runs.
        error_dir: returns the folder of the error file, which may not be known at the start.
        stop: handler of the stop signals of this process.

    Returns:
        The exit status.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        work()
    except Interrupted as interrupted:
        return interrupted.exit_status
    except NothingToDo as reason:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            log.info(reason)
        return 0
    except (InputError, RunError) as error:
        write_error_file(error_dir(), rank, error)
        external = "TORCHELASTIC_RUN_ID" in os.environ
        if isinstance(error, InputError) and not external:
            return error.exit_status  # the supervisor reads it from the file
        if isinstance(error, (InputError, RendezvousError)) and os.environ.get("LOCAL_RANK", "0") != "0":
            # All ranks of this node have the same error: the first prints it, and its exit ends the others.
            time.sleep(_FIRST_RANK_REPORTS_S)
        log.warning(f"rank {rank}: {error}")
        return error.exit_status
    except BaseException as error:
        write_error_file(error_dir(), rank, error)
        if stop.received is not None:  # a consequence: its peers have stopped already
            log.error(f"rank {rank} failed while stopping: {error_reason(error)}")
            return 128 + stop.received
        log.error(f"rank {rank} failed:\n{traceback.format_exc()}")
        return 1
    return 0


def run_on_all_ranks(config: TrainConfig, module: str, limit_s: float) -> Optional[Dict[str, Any]]:
    """Start the ranks of this node with a module that calls `rank_main`.

    Args:
        config: topology and hardware; its timeouts are overwritten.
        module: module that each rank runs.
        limit_s: timeout in seconds of the rendezvous.

    Returns:
        The result of rank 0; None on secondary nodes.

    Raises:
        InputError, RunError: the error of a rank.
    """
    config.run.rendezvous_timeout_s, config.run.stall_timeout_s = limit_s, _STALL_S
    with tempfile.TemporaryDirectory(prefix="lit_glm-trial-") as name:
        folder = Path(name)
        job = JobSpec(train_config(config), time.monotonic(), [])
        job.write(folder)
        node = resolve_node(config.topology, config.hardware.runtime == "simulated")
        with Supervisor() as supervisor:
            supervisor.run(job, node, folder, module=module, margin_s=_MARGIN_S)
        if node.rank > 0:
            return None
        return json.loads((folder / _FILE).read_text(encoding="utf-8"))


def rank_main(folder: Path, work: Callable[[TrainConfig], Dict[str, Any]]) -> int:
    """Call `work` on this rank after all ranks have joined; write what rank 0 returns to `folder`.

    Returns:
        The exit status.
    """
    set_up_console()
    config = JobSpec.read(folder).config
    heartbeat = Heartbeat(folder, int(os.environ["RANK"]))

    def join_and_work() -> None:
        with stop.interruptible(), process_group(config):
            heartbeat()
            import torch

            result = work(config)
            if torch.distributed.get_rank() == 0:
                write_json(folder / _FILE, result)
            torch.distributed.barrier()

    with StopRequest(config.run.shutdown_timeout_s, exit_rank) as stop:
        return run_and_report_errors(join_and_work, lambda: folder, stop)


if __name__ == "__main__":
    exit_now(main(Path(sys.argv[1])))
