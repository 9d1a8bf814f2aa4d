"""Handlers of stop signals, which record a signal and shut the process down in order."""

import logging
import os
import select
import signal
import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional, TypeVar

from lit_glm.errors import InputError, RunError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED_STATUSES = tuple(128 + number for number in STOP_SIGNALS)
"""Exit statuses of a process that a stop signal interrupted."""
_NOTHING_TO_SAVE_S = 5.0
"""Seconds for a process to stop before its first step, when a library may be waiting for other ranks."""
SECOND_SIGINT_S = 0.5
"""Seconds after which a second SIGINT is a new Ctrl-C: a terminal and a launcher may both deliver the first."""


class Interrupted(BaseException):
    """Interruption by a stop signal. Not an `Exception`, so that no library handles it as an error of its own."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + int(signal_number)


_Self = TypeVar("_Self", bound="StopSignals")


class StopSignals:
    """Context manager that handles the stop signals (in the main thread; elsewhere it receives none).

    An earlier handler for SIGUSR1 or SIGUSR2, such as submitit's, is called on exit.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        """The first signal."""
        self._previous: Dict[int, Any] = {}

    def __enter__(self: _Self) -> _Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                before = signal.getsignal(number)
                if number in (signal.SIGINT, signal.SIGTERM) or before != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._previous[number] = before
                    signal.signal(number, self._handle)
        outer = getattr(self._previous.get(signal.SIGTERM), "__self__", None)
        if isinstance(outer, StopSignals) and outer.received is not None:
            # Its exception was lost: Python ignores exceptions raised in destructors and interpreter callbacks.
            self._handle(outer.received, None)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        earlier = self._previous.get(self.received or 0)
        outer = getattr(earlier, "__self__", None)
        if isinstance(outer, StopSignals):
            outer.received = outer.received or self.received  # it has been handled here
        elif self.received in (signal.SIGUSR1, signal.SIGUSR2) and callable(earlier):
            earlier(self.received, None)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.received is None:
            self.received = number
        self.on_signal(number)

    def on_signal(self, number: int) -> None:
        """React to a signal; called in the main thread for each one."""


class RaisingStopSignals(StopSignals):
    """Handler that raises `Interrupted` on a signal, for use before a run and between the jobs of a sweep."""

    def __init__(self) -> None:
        super().__init__()
        self.before_raising: Callable[[int], None] = lambda _number: None

    def on_signal(self, number: int) -> None:
        """Raise `Interrupted`."""
        self.before_raising(number)
        raise Interrupted(number)


@contextmanager
def reraise_interruption() -> Iterator[None]:
    """Raise the `Interrupted` that an error of the block has replaced.

    The cleanup code of a library can fail when a stop signal interrupts the code before it.
    """
    try:
        yield
    except Exception as error:
        earlier = error.__context__
        while earlier is not None and not isinstance(earlier, Interrupted):
            earlier = earlier.__context__
        if earlier is None:
            raise
        raise earlier from None


def call_before_stop(call: Callable[[int], None]) -> None:
    """Let a stop signal of this process call a function before it is raised as `Interrupted`."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(handler, RaisingStopSignals):
        handler.before_raising = call


def run_interruptible(work: Callable[[], int]) -> int:
    """Call the work of a command; return its exit status, for its own errors and stop signals without a traceback."""
    try:
        with RaisingStopSignals(), reraise_interruption():
            return work()
    except (InputError, RunError) as error:
        log.error(error)
        return error.exit_status
    except KeyboardInterrupt:  # a job of a sweep was stopped, which has been reported
        return 128 + signal.SIGINT
    except Interrupted as stop:
        log.error(stop)
        return stop.exit_status


def ignore_stop_signals() -> None:
    """Ignore the stop signals while the interpreter exits: the exit status has been decided."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest(StopSignals):
    """Handler that stops the work of one rank: after the current step, or at once if there is nothing to save yet.

    A thread also receives the signal, through the interpreter's wake-up descriptor, even while the main thread is
    inside a library. It exits the process when the time for an orderly shutdown is over, or at a second Ctrl-C.
    """

    def __init__(self, limit_s: float, give_up: Callable[[int, str], None]) -> None:
        """Configure the handler.

        Args:
            limit_s: seconds for an orderly shutdown (run.shutdown_timeout_s).
            give_up: called with the signal and the reason; exits the process.
        """
        super().__init__()
        self._limit_s, self._give_up = limit_s, give_up
        self.module: Any = None
        """Module whose `stop_requested` is set; None if there is nothing to save."""
        self._interruptible = False
        self._thread: Optional[threading.Thread] = None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Make signals raise `Interrupted` in the main thread inside the block, until there is something to save.

        Raises:
            Interrupted: also for a signal that was received before the block.
        """
        self._interruptible = True
        try:
            if self.received is not None:
                raise Interrupted(self.received)
            yield
        finally:
            self._interruptible = False

    def save_first(self, module: Any) -> None:
        """Make signals set `stop_requested` of a module that is about to be trained."""
        self.module = module
        self._interruptible = False
        module.stop_requested = self.received is not None

    def on_signal(self, number: int) -> None:
        """Request the training loop to stop, or raise `Interrupted`."""
        if self.module is not None:
            self.module.stop_requested = True
        elif self._interruptible:
            self._interruptible = False  # only once, so that cleanup is not interrupted
            raise Interrupted(number)

    def __enter__(self) -> "StopRequest":
        super().__enter__()
        if self._previous:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._thread is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)
        super().__exit__(*error)

    def _watch(self) -> None:
        first, since, limit = 0, 0.0, 0.0
        while True:
            left = max(0.0, since + limit - time.monotonic()) if first else None
            if not select.select([self._read], [], [], left)[0]:
                self._give_up(first, f"has not stopped within {limit:g} s (run.shutdown_timeout_s)")
                return
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                if number not in self._previous:
                    continue
                if not first:
                    first, since = number, time.monotonic()
                    limit = self._limit_s
                    if self.module is None and self._interruptible:
                        limit = min(limit, _NOTHING_TO_SAVE_S)
                elif number == signal.SIGINT and time.monotonic() - since > SECOND_SIGINT_S:
                    self._give_up(first, "was terminated by a second Ctrl-C")
                    return
