"""Work that need not be done on the step path: a thread does it, in order, and nothing of it is lost."""

import queue
import threading
from typing import Any, Callable, Optional

from lit_glm.errors import RunError


class Later:
    """Calls functions one after the other in a thread. An error comes back to the caller at its next call."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Optional[Callable[[], Any]]] = queue.SimpleQueue()
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._work, name="later", daemon=True)
        self._thread.start()

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
        done.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise RunError(f"the run's files cannot be written: {error}") from error
            raise error

    def _work(self) -> None:
        while True:
            function = self._waiting.get()
            if function is None:
                return
            try:
                function()
            except BaseException as error:  # the thread goes on: what follows may still succeed
                self._error = self._error or error

    def close(self) -> None:
        """Do what is left and end the thread."""
        self._waiting.put(None)
        self._thread.join()
        self._raise()
