"""Work that need not be done on the step path: a thread does it, in order, and nothing of it is lost."""

import atexit
import queue
import threading
from typing import Any, Callable, Optional

from lit_glm.errors import RunError

_PAUSE_S = 0.25
"""Work is left to gather for so long: to wake the thread at every step costs short steps more than what it does."""


class Later:
    """Calls functions one after the other in a thread. An error comes back to the caller at its next call."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Optional[Callable[[], Any]]] = queue.SimpleQueue()
        self._error: Optional[BaseException] = None
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._work, name="later", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def do(self, function: Callable[[], Any]) -> None:
        """Have a function called soon.

        Raises:
            whatever an earlier one has raised, once.
        """
        self._raise()
        self._waiting.put(function)

    def drain(self) -> None:
        """Wait until all that was asked for is done.

        Raises:
            whatever any of it has raised, once.
        """
        done = threading.Event()
        self._waiting.put(done.set)
        self._hurry.set()
        done.wait()
        self._hurry.clear()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise RunError(f"the run's files cannot be written: {error}") from error
            raise error

    def _work(self) -> None:
        for function in iter(self._next, None):
            try:
                function()
            except BaseException as error:  # the thread goes on: what follows may still succeed
                self._error = self._error or error

    def _next(self) -> Optional[Callable[[], Any]]:
        try:
            return self._waiting.get_nowait()
        except queue.Empty:
            function = self._waiting.get()
            self._hurry.wait(_PAUSE_S)
            return function

    def close(self) -> None:
        """Do what is left and end the thread."""
        atexit.unregister(self._end)
        self._end()
        self._raise()

    def _end(self) -> None:
        self._waiting.put(None)
        self._hurry.set()
        self._thread.join()
