"""Processes of the jobs of a sweep whose launcher is joblib or submitit: stopping them so that their runs save.

joblib kills all workers when the process that started the sweep raises an error, or when a worker exits.
"""

import logging
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, List, Optional

import psutil

from lit_glm.launch.signals import STOP_SIGNALS

log = logging.getLogger(__name__)

_MARGIN_S = 10.0
_POLL_S = 0.2
_RECORD_S = 1.0  # for a worker to write the record of a job that has ended

_stopped_by: Optional[int] = None


def worker_stop_signal() -> Optional[int]:
    """Return the stop signal that this joblib worker has received; it then runs no further job. None without one."""
    return _stopped_by


def record_worker_stop(number: int, _frame: Any = None) -> None:
    """Record the stop signal that this joblib worker has received; also its signal handler outside runs."""
    global _stopped_by
    _stopped_by = _stopped_by or number


def install_worker_handlers() -> None:
    """Make this joblib worker record stop signals instead of exiting, after which joblib would kill all workers."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, record_worker_stop)


def is_joblib(launcher: str) -> bool:
    """Return whether the class of a launcher is that of joblib."""
    return "joblib" in launcher


def _runs_a_job(worker: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return worker.is_running() and bool(worker.children())
    return False


class JobProcesses:
    """Job processes of a sweep that this process started."""

    def __init__(self, launcher: str, sweep_dir: Path) -> None:
        """Describe the sweep.

        Args:
            launcher: class of Hydra's launcher.
            sweep_dir: folder of the sweep.
        """
        self._launcher, self._sweep_dir = launcher, sweep_dir
        self._is_local = "submitit" in launcher and launcher.endswith("LocalLauncher")

    def stop(self, number: int, shutdown_s: float) -> None:
        """Signal the jobs on this machine, and wait until they have saved.

        Args:
            number: the stop signal.
            shutdown_s: seconds that a run has to save.
        """
        end = time.monotonic() + shutdown_s + _MARGIN_S
        if is_joblib(self._launcher):
            workers = psutil.Process().children()
            for worker in workers:
                with suppress(psutil.Error):  # it has exited meanwhile
                    worker.send_signal(number)
            while time.monotonic() < end and any(map(_runs_a_job, workers)):
                time.sleep(_POLL_S)
            time.sleep(_RECORD_S)
        for job in self._local_jobs():
            with suppress(psutil.Error):
                for process in job.children() or [job]:  # a controller that is signalled kills its task after a second
                    process.send_signal(signal.SIGINT)  # submitit bypasses SIGTERM outside runs
        while time.monotonic() < end and self._local_jobs():
            time.sleep(_POLL_S)

    def print_remaining(self) -> None:
        """Print which jobs stay queued or running after this process, and how to cancel them."""
        local = " ".join(str(job.pid) for job in self._local_jobs())
        if local:
            log.warning(f"jobs of this sweep are still running (processes {local}); stop them with: kill -INT {local}")
        left = self._unfinished_jobs()
        if left and not self._is_local and shutil.which("scancel"):
            jobs = " ".join(dict.fromkeys(name.partition("_")[0] for name in left))
            log.warning(
                f"{len(left)} job{'s' * (len(left) > 1)} of this sweep may still be queued or running in Slurm "
                f"({', '.join(left)}); cancel with: scancel {jobs}"
            )

    def _unfinished_jobs(self) -> List[str]:
        """Return the names of submitit's jobs without a result: the number of a job, and its task."""
        return [
            file.name.replace("_submitted.pkl", "")
            for file in sorted((self._sweep_dir / ".submitit").glob("*/*_submitted.pkl"))
            if not list(file.parent.glob("*_result.pkl"))
        ]

    def _local_jobs(self) -> List[psutil.Process]:
        """Return the running jobs of submitit's launcher for one machine, whose numbers are those of processes."""
        numbers = {name.partition("_")[0] for name in self._unfinished_jobs()} if self._is_local else set()
        processes = psutil.process_iter(["status"]) if numbers else iter(())
        found = [process for process in processes if str(process.pid) in numbers]
        return [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
