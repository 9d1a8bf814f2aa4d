"""perf.log: events of a run in FlagPerf's format and with its conventions.

[PerfLog] {"event": "STEP_END", "value": {...}, "metadata": {"file": F, "lineno": N, "time_ms": T, "rank": 0}}

FlagPerf's conventions: loss of rank 0 only, learning rate after the scheduler's step, samples as steps x global batch.
"""

import inspect
import json
import math
import time
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.runs.run_writer import reported_write
from lit_glm.training.module import StepMetrics

_FLUSH_EVERY_S = 0.05


class PerfLog:
    """Writer of a run folder's perf.log, which appends one line per event."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._flushed = 0.0

    def event(self, name: str, value: Optional[Any], time_ms: int, **keys: Any) -> None:
        """Write one event.

        Args:
            name: STEP_END, EVALUATE, ...
            value: a dict is written as "value", a string as "other"; None: neither.
            time_ms: time of the event, in ms since the epoch.
            keys: step, epoch or loss.
        """
        here = inspect.currentframe()
        teller = here.f_back.f_back if here is not None and here.f_back is not None else None  # of `PerfEvents.emit`
        line: Dict[str, Any] = {"event": name}
        if value is not None:
            line["other" if isinstance(value, str) else "value"] = value
        line.update(keys)
        line["metadata"] = {
            "file": "" if teller is None else teller.f_code.co_filename,
            "lineno": 0 if teller is None else teller.f_lineno,
            "time_ms": time_ms,
            "rank": 0,
        }
        with reported_write(self._path):
            self._file.write(f"[PerfLog] {json.dumps(_replace_non_finite(line))}\n")
            # steps.csv is flushed at every step; a second flush would take a large part of a short step.
            if not name.startswith("STEP_") or time.monotonic() > self._flushed + _FLUSH_EVERY_S:
                self._file.flush()
                self._flushed = time.monotonic()


def _replace_non_finite(value: Any) -> Any:
    """Replace non-finite numbers by None, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_non_finite(entry) for key, entry in value.items()}
    return value


class PerfEvents:
    """Emitter of FlagPerf's events; does nothing without a log, which only rank 0 has."""

    def __init__(self, config: TrainConfig, account: RunMetrics) -> None:
        self._config, self._account = config, account
        self.log: Optional[PerfLog] = None

    def emit(self, name: str, value: Optional[Any] = None, ago: float = 0.0, **keys: Any) -> None:
        """Emit an event that happened `ago` seconds ago."""
        if self.log is None:
            return
        time_ms = int(1e3 * (time.time() - ago))
        self.log.event(name, value, time_ms, **keys)

    def submitted(self, examples: Tuple[int, int]) -> None:
        """Emit SUBMIT_INFO of a new run; `examples` are the numbers of training and evaluation examples."""
        config = self._config
        names = {"model": config.model.name, "config": config.fix_hp}
        counts = {"train_examples": examples[0], "eval_examples": examples[1]}
        self.emit("SUBMIT_INFO", {**names, **counts}, ago=self._account.e2e())

    def step_ended(
        self, step: int, epoch: int, values: StepMetrics, next_lr: float, seconds: float, ends: bool
    ) -> None:
        """Emit STEP_END, after the evaluation of the step if one was due."""
        if self.log is None:
            return
        config, so_far = self._config, self._account.total_durations()
        loss = values.local_loss / config.optimizer.gradient_accumulation_steps
        value: Dict[str, Any] = {
            "global_steps": step,
            "num_trained_samples": step * config.global_batch,
            "epoch": epoch,
            "loss": loss,
            "eval_accuracy": self._account.accuracy,
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
        """Emit FINISHED with the result of the run."""
        steps = result["global_steps"]
        self.emit(
            "FINISHED",
            {
                "e2e_time": result["e2e_time"],
                "global_steps": steps,
                "num_trained_samples": steps * self._config.global_batch,
                "training_sequences_per_second": result["p_whole"],
                "converged": result["converged"],
                "final_accuracy": result["acc"],
                "raw_train_time": result["raw_train_time"],
                "init_time": result["init_time"],
                "pure_training_computing_time": result["pure_compute_time"],
                "throughput(ips)_raw": result["p_whole"],
                "throughput(ips)_no_eval": result["p_train"],
                "throughput(ips)_pure_compute": result["p_core"],
            },
        )
