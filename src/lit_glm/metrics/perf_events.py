"""perf.log: events of a run in FlagPerf's format and with its conventions.

[PerfLog] {"event": "STEP_END", "value": {...}, "metadata": {"file": F, "lineno": N, "time_ms": T, "rank": 0}}

FlagPerf's conventions: loss of rank 0 only, learning rate after the scheduler's step, samples as steps x global batch.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, TextIO, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.runs.run_writer import reported_write
from lit_glm.training.module import StepMetrics

_FLUSH_EVERY_S = 0.05


def _replace_non_finite(value: Any) -> Any:
    """Replace non-finite numbers by None, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_non_finite(entry) for key, entry in value.items()}
    return value


class PerfEvents:
    """Emitter of FlagPerf's events; does nothing without a log, which only rank 0 has."""

    def __init__(self, config: TrainConfig, run_metrics: RunMetrics) -> None:
        self._config, self._run_metrics = config, run_metrics
        self._file: Optional[TextIO] = None
        self._last_flush = 0.0

    def open(self, run_dir: Path) -> None:
        """Open perf.log of a run folder, to which each event adds a line."""
        self._file = (run_dir / "perf.log").open("a", encoding="utf-8")

    def emit(self, name: str, value: Optional[Dict[str, Any]] = None, ago: float = 0.0, **keys: Any) -> None:
        """Emit an event that happened `ago` seconds ago; `keys` are step, epoch or loss."""
        if self._file is None:
            return
        caller = sys._getframe(1)
        location = {"file": caller.f_code.co_filename, "lineno": caller.f_lineno}
        values = {} if value is None else {"value": value}
        metadata = {**location, "time_ms": int(1e3 * (time.time() - ago)), "rank": 0}
        line = _replace_non_finite({"event": name, **values, **keys, "metadata": metadata})
        with reported_write(Path(self._file.name)):
            self._file.write(f"[PerfLog] {json.dumps(line)}\n")
            # steps.csv is flushed at every step; a second flush would take a large part of a short step.
            if not name.startswith("STEP_") or time.monotonic() > self._last_flush + _FLUSH_EVERY_S:
                self._file.flush()
                self._last_flush = time.monotonic()

    def submitted(self, examples: Tuple[int, int]) -> None:
        """Emit SUBMIT_INFO of a new run; `examples` are the numbers of training and evaluation examples."""
        config = self._config
        names = {"model": config.model.name, "config": config.fix_hp}
        counts = {"train_examples": examples[0], "eval_examples": examples[1]}
        self.emit("SUBMIT_INFO", {**names, **counts}, ago=self._run_metrics.e2e())

    def step_ended(
        self, step: int, epoch: int, values: StepMetrics, next_lr: float, seconds: float, ends: bool
    ) -> None:
        """Emit STEP_END, after the evaluation of the step if one was due."""
        if self._file is None:
            return
        config, so_far = self._config, self._run_metrics.total_durations()
        loss = values.local_loss / config.optimizer.gradient_accumulation_steps
        value: Dict[str, Any] = {
            "global_steps": step,
            "num_trained_samples": step * config.global_batch,
            "epoch": epoch,
            "loss": loss,
            "eval_accuracy": self._run_metrics.accuracy,
            "no_eval_time": so_far.no_eval,
            "pure_compute_time": so_far.pure_compute,
            "learning_rate": next_lr,
            "seq/s": config.global_batch / seconds if seconds else None,
            "end_training": ends,
        }
        if values.loss_scale is not None:
            value["loss_scale"] = values.loss_scale
        self.emit("STEP_END", value, step=step, loss=loss)

    def finished(self, result: Dict[str, Any]) -> None:
        """Emit FINISHED with the result of the run; as in FlagPerf, every step counts with the global batch size."""
        counted, samples = result["global_steps"] * self._config.global_batch, result["num_trained_samples"]
        whole, train, core = (
            rate if rate is None or not samples else rate * counted / samples
            for rate in (result["p_whole"], result["p_train"], result["p_core"])
        )
        self.emit(
            "FINISHED",
            {
                "e2e_time": result["e2e_time"],
                "global_steps": result["global_steps"],
                "num_trained_samples": counted,
                "training_sequences_per_second": whole,
                "converged": result["converged"],
                "final_accuracy": result["acc"],
                "raw_train_time": result["raw_train_time"],
                "init_time": result["init_time"],
                "pure_training_computing_time": result["pure_compute_time"],
                "throughput(ips)_raw": whole,
                "throughput(ips)_no_eval": train,
                "throughput(ips)_pure_compute": core,
            },
        )
