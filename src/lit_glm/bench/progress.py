"""What a person sees while a run goes on: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from typing import Any, Optional

import pytorch_lightning as pl

from lit_glm.bench.recorder import Recorder


class Progress(pl.Callback):
    """Reads what the recorder knows; costs nothing between its updates."""

    def __init__(self, every_s: float = 0.5, line_every_s: float = 10.0) -> None:
        """Choose how often.

        Args:
            every_s: seconds between updates of the bar.
            line_every_s: seconds between lines where there is no terminal.
        """
        self._terminal = sys.stdout.isatty()
        self._every = every_s if self._terminal else line_every_s
        self._next = 0.0
        self._bar: Optional[Any] = None
        self._task: Any = None
        self._accuracy: Optional[float] = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin."""
        if not trainer.is_global_zero:
            return
        recorder = _recorder(trainer)
        self._accuracy = recorder.accuracy
        when = f"after step {pl_module.steps_done}" if pl_module.steps_done else "before training"
        print(f"lit_glm: accuracy {when} {_percent(recorder.accuracy)}", flush=True)
        if self._terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar.start()
            self._task = self._bar.add_task("", total=recorder.total_steps(), completed=pl_module.steps_done)
        self._next = time.monotonic() + self._every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say where the run is, if it is time."""
        if not trainer.is_global_zero:
            return
        recorder = _recorder(trainer)
        evaluated = recorder.accuracy != self._accuracy
        if time.monotonic() < self._next and not evaluated:
            return
        self._next = time.monotonic() + self._every
        self._accuracy = recorder.accuracy
        step, seconds = pl_module.steps_done, recorder.seconds()
        rate = recorder.samples_here() / seconds.no_eval if seconds.no_eval else 0.0
        text = (
            f"step {step}  loss {float(pl_module.outcome.loss):.4f}  accuracy {_percent(recorder.accuracy)}  "
            f"{rate:.1f} samples/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            print(f"lit_glm: {text}", flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _recorder(trainer: pl.Trainer) -> Recorder:
    return next(entry for entry in trainer.callbacks if isinstance(entry, Recorder))  # type: ignore[attr-defined]


def _percent(share: Optional[float]) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
