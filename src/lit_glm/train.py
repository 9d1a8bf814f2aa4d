"""`python -m lit_glm.train`: run one benchmark, or a sweep with -m."""

import logging
import time

_ENTRY = time.monotonic()  # e2e_time counts from here if this is the program

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List, Optional  # noqa: E402

from lit_glm.config.command_line import CommandLine  # noqa: E402
from lit_glm.config.hydra_main import TaskOutcome, is_sweep_job, output_dir, run_command  # noqa: E402
from lit_glm.config.schema import TrainConfig  # noqa: E402
from lit_glm.launch.signals import Interrupted, ignore_stop_signals  # noqa: E402
from lit_glm.process_utils import paused_gc  # noqa: E402

log = logging.getLogger("lit_glm.train")


def train(config: TrainConfig, composed: Any, start_time: float) -> TaskOutcome:
    """Run one job, or one combination of a sweep; `start_time` is `time.monotonic()` at its start."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.hardware.env import set_hardware_env

    started = time.monotonic()
    set_hardware_env(config.hardware)  # before anything imports torch

    with paused_gc():
        from lit_glm.hardware.runtimes.selection import check_runtime_available
    from lit_glm.launch.rendezvous import is_external_rank
    from lit_glm.runs.run_folder import hydra_files

    hydra = HydraConfig.get()
    is_sweep = is_sweep_job()
    run_dir = output_dir() if is_sweep else Path(hydra.run.dir)
    files = hydra_files(composed, hydra, list(hydra.overrides.task))
    check_runtime_available(config.hardware, config.topology)
    is_external = is_external_rank(config.topology)
    if is_sweep:
        from lit_glm.launch.sweep import run_sweep_job

        return run_sweep_job(config, run_dir, files, sys.argv, started)
    if is_external:
        from lit_glm.launch.worker import run_under_torchrun
        from lit_glm.runs.job_spec import JobSpec

        return TaskOutcome(run_under_torchrun(JobSpec(config, start_time, sys.argv), run_dir, files))
    return TaskOutcome(run(config, run_dir, files, start_time))


def run(config: TrainConfig, run_dir: Path, files: Dict[str, str], start_time: float) -> int:
    """Run one job unless it is complete; return the exit status."""
    from lit_glm.data.memmap_dataset import prepare_data
    from lit_glm.launch.launcher import announce_early_end, report_complete_run, run_job
    from lit_glm.launch.rendezvous import resolve_node
    from lit_glm.runs.checkpoints import resume_hint
    from lit_glm.runs.discovery import find_run_dir
    from lit_glm.runs.job_spec import JobSpec
    from lit_glm.runs.run_folder import complete_result

    node, is_resume = resolve_node(config.topology, config.hardware.runtime == "simulated"), False
    with announce_early_end(config, node):
        if node.rank == 0:  # node 0 sends it to the others
            run_dir, is_resume = find_run_dir(config, run_dir)
        result = complete_result(run_dir) if is_resume else None
        if result is not None:
            report_complete_run(config, node, run_dir, result)
            return 0
        prepare_data(config)
    try:
        run_job(JobSpec(config, start_time, sys.argv, is_resume), run_dir, files, node)
    except Interrupted as stop:
        hint = f"; {resume_hint(run_dir)}" if node.rank == 0 else ""
        log.error(f"{stop}{hint}")
        return stop.exit_status
    return 0


def _before_sweep(composed: Any, line: CommandLine) -> List[str]:
    from lit_glm.launch.sweep import prepare_sweep

    return prepare_sweep(composed, line)


def main(start_time: Optional[float] = None) -> int:
    """Run the command and return the exit status; e2e_time counts from `start_time`, else from this call."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun does not notify its ranks
        from lit_glm.process_utils import set_parent_death_signal

        set_parent_death_signal(signal.SIGTERM)
    status = run_command("train", TrainConfig, partial(train, start_time=start_time or time.monotonic()), _before_sweep)
    sweep = sys.modules.get("lit_glm.launch.sweep")  # imported when a sweep starts
    if sweep is not None:
        # After Ctrl-C the records of the jobs contain which signal it was.
        finished = sweep.finish_sweep()
        status = finished if finished >= 128 else max(status, finished)
    return status


if __name__ == "__main__":
    outcome = main(_ENTRY)
    ignore_stop_signals()
    sys.exit(outcome)
