"""Signals while Lightning trains: its own handlers end with status 0, or wait for other ranks inside the handler."""

import signal

from lit_glm.jobs.interrupts import Signals


class Stops:
    """Ours after Lightning's, which come between two hooks of a callback: from the first on, signals are put off."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def put_off(self) -> None:
        """Lightning sets its handlers next."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals.numbers)

    def take(self) -> None:
        """It has."""
        self._signals.take()
        self.allow()

    def allow(self) -> None:
        """Signals are taken from here on; also after something has failed in between."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals.numbers)
