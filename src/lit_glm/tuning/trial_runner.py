"""Trials of a batch size: short runs of `train` in child processes, and their results."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, List, Optional

import numpy as np
import psutil

from lit_glm.errors import RunError
from lit_glm.planning.workload import Workload
from lit_glm.process_utils import GRACE_S, set_parent_death_signal, terminate_tree
from lit_glm.runs.result import read_result
from lit_glm.runs.run_writer import STEP_COLUMNS, read_csv_rows
from lit_glm.tuning.search import FITS, MEMORY, TIME, Trial

UNTIMED = 3
"""Number of warm-up steps, which touch memory and start kernels; the first one has the longest examples."""
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass
class TrialRunner:
    """Runner of the trials of a search."""

    overrides: List[str]
    """Overrides of the command line, without those that a trial sets itself."""
    flags: List[str]
    steps: int

    def command(self, bs: int, folder: Path) -> List[str]:
        """Return the command of a trial: few steps, longest examples first, no evaluation, checkpoint or logger."""
        own = [
            f"bs={bs}",
            f"run.max_steps={UNTIMED + self.steps}",
            "run.max_samples=1000000000000",
            "run.evaluate=false",
            "data.longest_first=true",
            "run.checkpoint_interval_steps=null",
            "model.init_checkpoint=null",
            "logger=none",
            "callbacks=none",
            f"hydra.run.dir='{folder}'",
            "run.overwrite=true",
        ]
        return [sys.executable, "-m", "lit_glm.train", *self.overrides, *own, *self.flags]

    def run(self, bs: int, folder: Path, work: Workload, seconds: float) -> Trial:
        """Run a trial of a batch size.

        Args:
            bs: the batch size.
            folder: run folder; the output goes to a .txt file of the same name next to it.
            work: workload of the steps.
            seconds: time limit.

        Raises:
            RunError: if it failed for another reason than a lack of memory or time.
        """
        log = folder.with_suffix(".txt")
        status = self._status(bs, folder, log, seconds)
        if status is None:
            return Trial(bs, TIME, message=f"exceeded the remaining {seconds:.0f} s")
        result = read_result(folder) or {}
        error = str(result.get("error") or "")
        if "out of memory" in error or status in _KILLED:
            return Trial(bs, MEMORY, message=error or "killed, most likely out of memory")
        if status != 0:
            raise RunError(f"bs={bs} exited with status {status}: {error or _last_line(log)} (full output: {log})")
        return _trial_from_run(bs, folder, work, result)

    def take_part(self, bs: int, folder: Path, node: int, seconds: float) -> None:
        """Run the part of a secondary node in a trial; node 0 evaluates the result."""
        self._status(bs, folder, folder.with_suffix(f".node{node}.txt"), seconds)

    def _status(self, bs: int, folder: Path, log: Path, seconds: float) -> Optional[int]:
        """Run a trial and return its exit status; None if it was terminated at its time limit."""
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                self.command(bs, folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
            )
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                terminate_tree(psutil.Process(process.pid), GRACE_S)
                return None
            except BaseException:
                terminate_tree(psutil.Process(process.pid), GRACE_S)
                raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _trial_from_run(bs: int, folder: Path, work: Workload, result: "dict[str, Any]") -> Trial:
    """Return a trial whose p_core follows from the FLOPs of the timed steps, so that their lengths do not bias it."""
    rows = read_csv_rows(folder / "steps.csv", STEP_COLUMNS)[UNTIMED:]
    flops = np.array([float(work.counter.flops_by_rank(int(row["step"])).mean()) for row in rows])
    seconds = sum(float(row["compute_s"]) for row in rows)
    per_sample = work.mean / bs
    p_core: Optional[float] = float(flops.sum()) / per_sample / seconds * work.ranks if seconds else None
    return Trial(
        bs,
        FITS,
        p_core,
        result.get("mfu"),
        result.get("mem_actual_gib"),
        result.get("samples_per_joule"),
    )
