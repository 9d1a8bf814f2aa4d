"""Job launcher: runs one device in this process, several under a supervisor; records how the job ended."""

import logging
import os
import signal
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence

from lit_glm.atomic_files import read_json
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.hardware.device_monitor import drop_readings_after, monitor_devices, readings_file
from lit_glm.hardware.monitors import is_mig_slice
from lit_glm.launch import heartbeat
from lit_glm.launch.heartbeat import STALL_MARGIN_S, StallWatchdog, run_watchdog, stall_message
from lit_glm.launch.rendezvous import Node, announce_end
from lit_glm.launch.signals import Interrupted, StopRequest, reraise_interruption
from lit_glm.launch.supervisor import Supervisor
from lit_glm.metrics.energy import energy_metrics, in_kilojoules
from lit_glm.metrics.registry import METRICS
from lit_glm.process_utils import fast_imports, kill_children, raise_open_files_limit
from lit_glm.runs.checkpoints import remove_partial, resume_hint
from lit_glm.runs.environment import read_environment
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import (
    RESULT_FILE,
    error_reason,
    extend_times_to_end,
    final_summary,
    mark_failed,
    mark_interrupted,
    read_result,
    replace_result,
    results_table,
    root_cause,
    settle_status,
    update_result,
    write_error_file,
)
from lit_glm.runs.run_folder import acquire_run_dir

log = logging.getLogger(__name__)


def run_job(
    job: JobSpec,
    run_dir: Path,
    config_files: Dict[str, str],
    node: Node,
    in_process: bool = True,
    output: Optional[Path] = None,
    limit_s: Optional[float] = None,
) -> Dict[str, Any]:
    """Run a job until it ends.

    Args:
        job: the job.
        run_dir: run folder.
        config_files: contents of the files in .hydra/.
        node: this node.
        in_process: whether a single device runs in this process rather than in a child process.
        output: file for the output of the ranks and for the result; None: that of this process.
        limit_s: seconds until the job is stopped; None: no limit. Only for child processes.

    Returns:
        The result; {} on secondary nodes, because node 0 owns the run folder.

    Raises:
        InputError, RunError, Interrupted: if the job did not end normally; result.json has the same status.
    """
    raise_open_files_limit()
    if job.config.topology.world_size == 1 and in_process:
        give_up = partial(exit_interrupted, job, run_dir)
        with StopRequest(job.config.run.shutdown_timeout_s, give_up) as stop, record_run(job, run_dir, config_files):
            _run_in_process(job, run_dir, stop)
    else:
        supervisor = Supervisor()
        # Announced after the supervisor restored the signal handlers, so that a second Ctrl-C interrupts it.
        with announce_early_end(job.config, node, lambda: supervisor.has_joined), supervisor:
            if node.rank > 0:
                with tempfile.TemporaryDirectory(prefix="lit_glm-node-") as name:
                    job.write(Path(name))
                    supervisor.run(job, node, Path(name), output=output)  # node 0 sends the path of the run folder
                return {}
            with record_run(job, run_dir, config_files, output) as lock:
                supervisor.run(job, node, run_dir, lock, output=output, limit_s=limit_s)
    result = read_result(run_dir)
    if result is None or result.get("status") == "running":
        raise RunError(f"{run_dir}: the job ended without a result")
    return result


@contextmanager
def record_run(
    job: JobSpec, run_dir: Path, config_files: Dict[str, str], output: Optional[Path] = None
) -> Iterator[int]:
    """Lock the run folder during a job; write its final status, device readings and energy there; print the result."""
    with acquire_run_dir(job, run_dir, config_files) as lock:
        settle_status(run_dir)  # of an earlier part whose launcher was killed
        before = read_json(run_dir / RESULT_FILE) if job.is_resume else None
        if job.is_resume:
            update_result(run_dir, status="running", error=None, earlier_e2e_time=None)
        try:
            with write_failure_status(run_dir, before), write_energy_metrics(job, run_dir, output is None):
                heartbeat.clear_heartbeats(run_dir)
                try:
                    yield lock
                finally:
                    extend_times_to_end(run_dir, job.start_time)
        finally:
            result = settle_status(run_dir)
            if result is not None:
                _print_result(result, job, run_dir, output)


def _print_result(result: Dict[str, Any], job: JobSpec, run_dir: Path, output: Optional[Path]) -> None:
    """Print summary and table of a run, its last output; `output`: the file to append them to instead."""
    summary, table = final_summary(result, job.config, run_dir), results_table([result])
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(f"{summary}\n{table}\n")
        return
    for line in summary.split("\n"):
        log.info(line)
    print(table, flush=True)


def report_complete_run(config: TrainConfig, node: Node, run_dir: Path, result: Dict[str, Any]) -> None:
    """Print the result of a run that is complete and needs no job, and notify the other nodes."""
    log.info(f"{run_dir}: the run is complete; nothing to do")
    print(results_table([result]), flush=True)
    announce_end(config, node, 0, "the run is complete; nothing to do")


@contextmanager
def monitor_node_devices(job: JobSpec, run_dir: Path, node: int) -> Iterator[None]:
    """Monitor a node's devices inside the block; timestamps continue those of an interrupted run."""
    file, before = readings_file(run_dir, node), (read_result(run_dir) or {}) if job.is_resume else {}
    if not job.is_resume and file.exists():
        file.unlink()  # of an overwritten run; node 0's was deleted with its run folder
    earlier_e2e = METRICS["e2e_time"].value(before)
    if earlier_e2e is not None:
        spans = before.get("training_spans_by_node") or [before.get("training_spans")]
        trained = spans[node] if node < len(spans) else None  # by the clock of that node
        drop_readings_after(file, max(earlier_e2e, trained[-1][1] if trained else 0.0))
    start_time = job.start_time - (earlier_e2e or 0.0)
    with monitor_devices(job.config.hardware, file, node, job.config.topology.devices_per_node, start_time):
        yield


@contextmanager
def write_energy_metrics(job: JobSpec, run_dir: Path, is_printed: bool = True) -> Iterator[None]:
    """Monitor the devices of node 0 inside the block; afterwards write the energy of all nodes into the result."""
    try:
        with monitor_node_devices(job, run_dir, 0):
            yield
    finally:
        result = read_result(run_dir)
        if result is not None and result.get("training_spans") and readings_file(run_dir, 0).is_file():
            spans = result.get("training_spans_by_node") or [result["training_spans"]]
            sliced = any(map(is_mig_slice, read_environment(run_dir).get("devices") or []))
            metrics = energy_metrics(run_dir, job.config, spans, result.get("num_trained_samples"), sliced)
            update_result(run_dir, **metrics)
            if is_printed and None not in (metrics["energy_j"], metrics["power_mean_w"], metrics["samples_per_joule"]):
                rate = METRICS["samples_per_joule"].form(metrics["samples_per_joule"])
                energy, power = in_kilojoules(metrics["energy_j"]), metrics["power_mean_w"]
                log.info(f"{energy} kJ, {rate} samples/J, {power:.0f} W on average")


@contextmanager
def write_failure_status(run_dir: Path, before: Optional[Dict[str, Any]]) -> Iterator[None]:
    """Record how the block ended in result.json and save the traceback of an unexpected error.

    Args:
        run_dir: the run folder.
        before: result.json of the earlier parts of a resumed run, which it keeps if its input is rejected: it can
            still be resumed as before.
    """
    try:
        with reraise_interruption():
            yield
    except Interrupted:
        remove_partial(run_dir)
        mark_interrupted(run_dir)
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, InputError) and before is not None:
            replace_result(run_dir, before)
            raise
        cause = root_cause(run_dir)
        if cause is None:
            write_error_file(run_dir, 0, error)
        mark_failed(run_dir, getattr(error, "summary", "") or cause or error_reason(error))
        if not isinstance(error, Exception):  # of a callback or a library; signals raise `Interrupted`
            raise RunError(f"{error_reason(error)} was raised inside the run; see {run_dir}/errors/") from error
        raise


@contextmanager
def announce_early_end(
    config: TrainConfig, node: Node, has_joined: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Notify the other nodes if this one fails before the rendezvous is complete; re-raise the error."""
    try:
        yield
    except (InputError, RunError, Interrupted) as error:
        if not has_joined():
            announce_end(config, node, error.exit_status, error_reason(error))
        raise


def exit_interrupted(job: JobSpec, run_dir: Path, number: int, reason: str) -> None:
    """Exit this process, whose run did not stop in time after a signal."""
    remove_partial(run_dir)
    extend_times_to_end(run_dir, job.start_time)
    mark_interrupted(run_dir)
    name = signal.Signals(number).name
    hint = f"; {resume_hint(run_dir)}" if run_dir.is_dir() else ""  # else the ranks have not met
    log.error(f"interrupted by {name}; the run {reason}{hint}")
    kill_children()
    os._exit(128 + number)


def watch_for_stalls(job: JobSpec, run_dir: Path, ranks: Sequence[int], margin_s: float) -> ContextManager[None]:
    """Exit this process if none of some ranks of this node has sent a heartbeat in time."""

    def end(traces: List[str]) -> None:
        message = stall_message(job.config, run_dir, traces)
        if 0 in ranks:  # else this node has another start time
            extend_times_to_end(run_dir, job.start_time)
        mark_failed(run_dir, message)
        log.error(message)
        kill_children()
        os._exit(1)

    return run_watchdog(StallWatchdog(run_dir, ranks, job.config.run.stall_timeout_s + margin_s), end)


_RANK_VARIABLES = (
    *"RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE".split(),
    *"SLURM_PROCID SLURM_LOCALID JSM_NAMESPACE_RANK".split(),
)
"""Variables from which this package and Lightning read a rank."""


def _run_in_process(job: JobSpec, run_dir: Path, stop: StopRequest) -> None:
    for name in _RANK_VARIABLES:  # of a launcher around this process, which is rank 0 of its own job
        os.environ.pop(name, None)
    with stop.interruptible(), fast_imports(job.config):
        from lit_glm.launch.rank_runner import run_rank
    with stop.interruptible(), watch_for_stalls(job, run_dir, [0], STALL_MARGIN_S):
        run_rank(job, run_dir, stop)
