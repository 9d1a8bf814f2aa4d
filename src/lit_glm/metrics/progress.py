"""Progress display of a run: a bar on a terminal, an occasional line elsewhere."""

import logging
import sys
import time
from typing import Any, Optional

import pytorch_lightning as pl

from lit_glm.metrics.benchmark_callback import find_benchmark_callback
from lit_glm.metrics.registry import METRICS, cell_text
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.training.evaluation import next_evaluation_step

log = logging.getLogger(__name__)


class ProgressCallback(pl.Callback):
    """Callback that displays the state of `BenchmarkCallback`; no cost between updates."""

    def __init__(self, every_s: float = 0.5, line_every_s: float = 10.0) -> None:
        """Set the update intervals.

        Args:
            every_s: seconds between updates of the bar.
            line_every_s: seconds between lines without a terminal.
        """
        self._terminal = sys.stdout.isatty()
        self._interval_s = every_s if self._terminal else line_every_s
        self._next = 0.0
        self._bar: Optional[Any] = None
        self._task: Any = None
        self._accuracy: Optional[float] = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print the accuracy before training, and start the bar."""
        if not trainer.is_global_zero:
            return
        benchmark = find_benchmark_callback(trainer)
        run_metrics = benchmark.run_metrics
        self._accuracy = run_metrics.accuracy
        when = f"after step {pl_module.steps_done}" if pl_module.steps_done else "before training"
        log.info(f"accuracy {when}: {cell_text(METRICS['acc'], run_metrics.accuracy) or '-'}")
        if self._terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar.start()
            self._task = self._bar.add_task("", total=run_metrics.config.total_steps, completed=pl_module.steps_done)
        self._next = time.monotonic() + self._interval_s

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the display if due."""
        if not trainer.is_global_zero:
            return
        benchmark = find_benchmark_callback(trainer)
        run_metrics, values = benchmark.run_metrics, benchmark.step_metrics
        assert values is not None
        if time.monotonic() < self._next and run_metrics.accuracy == self._accuracy:
            return
        self._next = time.monotonic() + self._interval_s
        self._accuracy = run_metrics.accuracy
        step = pl_module.steps_done
        text = _progress_line(run_metrics, step, values.loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            log.info(text)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Stop the bar, which restores the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _progress_line(run_metrics: RunMetrics, step: int, loss: float) -> str:
    """Format position, speed and remaining time of a run."""
    run, batch = run_metrics.config.run, run_metrics.config.global_batch
    seconds, total = run_metrics.durations(), run_metrics.config.total_steps
    rate = run_metrics.samples_here(step) / seconds.no_eval if seconds.no_eval else 0.0
    parts = [
        f"step {step} of {total} ({step / total:.0%})",
        f"{run_metrics.samples(step):,} samples",
        f"loss {loss:.4f}",
        f"accuracy {cell_text(METRICS['acc'], run_metrics.accuracy) or '-'}",
        f"{rate:.1f} samples/s",
    ]
    if rate and step < total:
        left = (total - step) * batch / rate
        if run.evaluate:  # evaluations are assumed to take the same share as so far
            left *= max(1.0, seconds.raw_train / seconds.no_eval)
            due = next_evaluation_step(step, batch, run, total)
            parts.append(f"next evaluation after step {due}, in {_format_duration((due - step) * batch / rate)}")
        target = f"at {100 * run.target_accuracy:g}% accuracy, " if run.evaluate else ""
        parts.append(f"stops {target}after {_format_duration(left)} at the latest")
    return "  ".join(parts)


def _format_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
