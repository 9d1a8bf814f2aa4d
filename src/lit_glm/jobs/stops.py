"""Signals while Lightning trains: its own handlers end with status 0, or wait for other ranks inside the handler."""

import signal
from typing import Any

import pytorch_lightning as pl

from lit_glm.jobs.interrupts import Signals


class Stops(pl.Callback):
    """Sets our handlers after Lightning's; between the two, signals are put off."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Lightning sets its handlers next."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals.numbers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """It has."""
        self._signals.take()
        self.allow()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Something failed in between."""
        self.allow()

    def allow(self) -> None:
        """Signals are taken from here on."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals.numbers)
