"""One try: a short run of `train` in a process of its own, and what it says of a batch size."""

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
"""Steps that touch memory and start kernels for the first time; the first one has the longest examples."""
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass
class TrialRunner:
    """Runs tries."""

    overrides: List[str]
    """Of the command line, without what a try sets itself."""
    flags: List[str]
    steps: int

    def command(self, bs: int, folder: Path) -> List[str]:
        """Of a try: few steps, the longest examples first, nothing evaluated, saved or logged."""
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
        """Try a batch size.

        Args:
            bs: the batch size.
            folder: the run's; its output goes to output.txt there.
            work: of its steps.
            seconds: how long it may take.

        Raises:
            RunError: if it failed otherwise than for want of memory or time.
        """
        log = folder.with_suffix(".txt")
        status = self._status(bs, folder, log, seconds)
        if status is None:
            return Trial(bs, TIME, message=f"took more than the {seconds:.0f} s that were left")
        result = read_result(folder) or {}
        error = str(result.get("error") or "")
        if "out of memory" in error or status in _KILLED:
            return Trial(bs, MEMORY, message=error or "killed, most likely for its memory")
        if status != 0:
            raise RunError(f"bs={bs} ended with status {status}: {error or _last_line(log)} (all it said: {log})")
        return _trial_from_run(bs, folder, work, result)

    def take_part(self, bs: int, folder: Path, node: int, seconds: float) -> None:
        """Run another node's part of a try; what came of it is the first node's to say."""
        self._status(bs, folder, folder.with_suffix(f".node{node}.txt"), seconds)

    def _status(self, bs: int, folder: Path, log: Path, seconds: float) -> Optional[int]:
        """Exit status of a try; None: it was ended for its time."""
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
    return lines[-1] if lines else "it said nothing"


def _trial_from_run(bs: int, folder: Path, work: Workload, result: "dict[str, Any]") -> Trial:
    """p_core from the work that the timed steps have done, so that lucky lengths decide nothing."""
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
