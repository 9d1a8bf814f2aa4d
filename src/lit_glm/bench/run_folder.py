"""The files of a run while it goes: result.json, the tables of steps, evaluations and memory, FlagPerf's lines."""

import time
from pathlib import Path
from typing import Any, Dict, Optional

from lit_glm.bench.figures import Seconds, figures
from lit_glm.bench.later import Later
from lit_glm.bench.perflog import PerfLog
from lit_glm.bench.result import SCHEMA_VERSION, of_config, read_result, write_json
from lit_glm.bench.tables import EVALS, MEMORY, STEPS, Table
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.training.schedule import converged

_RESULT_EVERY_S = 1.0


class RunFolder:
    """The files of a run, written by rank 0 as the run goes; a run that goes on continues them."""

    def __init__(self, run_dir: Path, config: TrainConfig, runtime: Runtime, steps_done: int, resumes: bool) -> None:
        """Open the files.

        Args:
            run_dir: the run folder.
            config: the run's.
            runtime: whether figures are simulated, whose memory counts.
            steps_done: steps that stand; later lines of an interrupted run are cut off.
            resumes: whether the folder holds an earlier part of this run.
        """
        self._path = run_dir
        self._config = config
        self._runtime = runtime
        keep = steps_done if resumes else None
        self.steps = Table(run_dir / "steps.csv", STEPS, keep)
        self.evals = Table(run_dir / "evals.csv", EVALS, keep)
        self.memory = Table(run_dir / "memory.csv", MEMORY, keep)
        self.later = Later()
        self.perf = PerfLog(run_dir / "perf.log", do=self.later.do)
        self._before = (read_result(run_dir) or {}) if resumes else {}
        self._interruptions = int(self._before.get("interruptions", 0)) + int(resumes)
        self._written = 0.0
        self._earlier = Seconds(
            pure_compute=self.steps.total("compute_s"),
            no_eval=self.steps.total("step_s"),
            raw_train=float(self._before.get("raw_train_time") or 0.0),
            init=float(self._before.get("init_time") or 0.0),
        )
        self.accuracy: Optional[float] = float(self.evals.rows[-1]["acc"]) if self.evals.rows else None
        self.evaluated_step = int(self.evals.rows[-1]["step"]) if self.evals.rows else -1

    def earlier(self) -> Seconds:
        """Time before the interruption: of steps that stand, and all of initialisation and training."""
        return self._earlier

    def write(self, status: str, step: int, skipped: int, seconds: Seconds, e2e: float, **more: Any) -> Dict[str, Any]:
        """Write result.json.

        Args:
            status: running, success, finished, interrupted or failed.
            step: steps done.
            skipped: of these, with a loss that is not finite.
            seconds: of this process; what was measured before an interruption is added here.
            e2e: seconds since the entry of `train` of this process.
            more: further entries.
        """
        config = self._config
        samples = step * config.global_batch
        used, total = more.pop("memory", None), self._runtime.total_memory(0)
        peak = None if used is None or total is None else used / 2**30
        result = {
            "status": status,
            **of_config(config),
            "e2e_time": e2e + float(self._before.get("e2e_time") or 0.0),
            **figures(samples, seconds + self.earlier()),
            "acc": self.accuracy,
            "mem_actual_gib": peak if peak is None else max(peak, float(self._before.get("mem_actual_gib") or 0.0)),
            "mem_total_gib": None if total is None else total / 2**30,
            "mfu": None,
            "mfu_flagperf": None,
            "tokens_per_s": None,
            "candidates_per_s": None,
            "rank_imbalance": None,
            "converged": converged(self.accuracy, config.run),
            "num_trained_samples": samples,
            "global_steps": step,
            "skipped_steps": skipped,
            "interruptions": self._interruptions,
            "runtime": self._runtime.name,
            "simulated": self._runtime.simulated,
            "tf32": config.precision.tf32 and self._runtime.has_tf32,
            **more,
            "schema_version": SCHEMA_VERSION,
        }
        write_json(self._path / "result.json", result)
        in_use = self._runtime.memory_now(0)
        if in_use is not None:
            self.memory.add(step=step, seconds=round(result["e2e_time"], 3), gib=round(in_use / 2**30, 4))
        return result

    def write_later(self, step: int, skipped: int, seconds: Seconds, e2e: float) -> None:
        """Have result.json written off the step path, with what is known now; arguments as for `write`."""
        self._written = time.monotonic()
        self.later.do(lambda: self.write("running", step, skipped, seconds, e2e, memory=self._peak()))

    def _peak(self) -> Optional[float]:
        """Of this rank's card; ranks that share a memory are summed in the end, and their sum is unknown before."""
        alone = self._config.topology.devices_per_node == 1 or not self._runtime.shares_memory
        return self._runtime.peak_memory(0) if alone else None

    def add_evaluation(self, step: int, samples: int, accuracy: float, seconds: float) -> None:
        """A line of evals.csv; result.json has this accuracy from now on."""
        self.evals.add(step=step, samples=samples, acc=accuracy, seconds=round(seconds, 6))
        self.accuracy = accuracy

    def stale(self) -> bool:
        """Whether result.json is old enough to be written again."""
        return time.monotonic() - self._written > _RESULT_EVERY_S
