"""Stop signals: turned into a request that the training loop takes up, and kept away from Lightning's handlers."""

import signal
from typing import Any, Optional

EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def stop_signals() -> "list[signal.Signals]":
    """The signals that stop a job; a hangup does not where it is ignored, as by nohup."""
    return [n for n in EXIT_STATUS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Interrupted(Exception):
    """The run was asked to stop and has saved what it had."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = EXIT_STATUS.get(signal.Signals(signal_number), 128 + signal_number)


class StopSignalHandler:
    """Turns the signals that stop into a request that the training loop takes up; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self.module: Any = None
        """Whose `stop_requested` is set; None: there is nothing to save yet."""
        self.numbers = stop_signals()
        self._before = {number: signal.getsignal(number) for number in self.numbers}
        self.install()

    def install(self) -> None:
        """Set the handlers: at first, and again after somebody else has set his."""
        for number in self.numbers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: Any) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if self.module is None or again:
            raise Interrupted(number)  # nothing to save yet, or no patience left
        self.module.stop_requested = True

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class SignalMask:
    """Ours after Lightning's, which come between two hooks of a callback: from the first on, signals are put off."""

    def __init__(self, signals: StopSignalHandler) -> None:
        self._signals = signals

    def block(self) -> None:
        """Lightning sets its handlers next."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals.numbers)

    def reinstall_and_unblock(self) -> None:
        """It has."""
        self._signals.install()
        self.unblock()

    def unblock(self) -> None:
        """Signals are taken from here on; also after something has failed in between."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals.numbers)
