"""A logger off the step path: a server that is slow, or fails, costs a run nothing but its curves."""

import queue
import sys
import threading
import time
from typing import Any, Callable, Optional

from pytorch_lightning.loggers import Logger

_TRIES = 3
_PAUSE_S = 2.0
_WAIT_S = 20.0
"""How long the end of a run waits for what has not been sent."""


class BackgroundLogger(Logger):
    """Calls another logger from a thread, in order; a call that fails is tried again, then left out."""

    def __init__(self, logger: Any, wait_s: float = _WAIT_S) -> None:
        super().__init__()
        self._logger, self._wait_s = logger, wait_s
        self._calls: queue.Queue[Optional[Callable[[], Any]]] = queue.Queue()
        self._lost = 0
        self._thread: Optional[threading.Thread] = None

    @property
    def name(self) -> Optional[str]:
        """Of the logger."""
        return str(type(self._logger).__name__)

    @property
    def version(self) -> Any:
        """A run has one."""
        return ""

    @property
    def experiment(self) -> Any:
        """Of the logger."""
        return self._logger.experiment

    def log_metrics(self, metrics: Any, step: Optional[int] = None) -> None:
        """Send a point later."""
        self._call(lambda: self._logger.log_metrics(metrics, step=step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Send hyperparameters later."""
        self._call(lambda: self._logger.log_hyperparams(params))

    def finalize(self, status: str) -> None:
        """End the logger later."""
        self._call(lambda: self._logger.finalize(status))

    def close(self) -> None:
        """Wait, but not long, for what has not been sent; then say what is missing."""
        experiment = getattr(self._logger, "experiment", None)
        end = next((getattr(experiment, name, None) for name in ("finish", "close") if hasattr(experiment, name)), None)
        if callable(end):
            self._call(end)
        limit = time.monotonic() + self._wait_s
        while self._calls.unfinished_tasks and time.monotonic() < limit:
            time.sleep(0.02)
        missing = self._lost + self._calls.unfinished_tasks
        if missing:
            text = f"its curves are incomplete: {missing} calls have not reached it"
            print(f"lit_glm: {self.name}: {text}", file=sys.stderr)

    def _call(self, call: Callable[[], Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="logger", daemon=True)
            self._thread.start()
        self._calls.put(call)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is not None:
                self._try(call)
            self._calls.task_done()

    def _try(self, call: Callable[[], Any]) -> None:
        for number in range(1, _TRIES + 1):
            try:
                call()
                return
            except Exception as error:  # of a server, a network, a library
                if self._lost == 0 and number == 1:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                    print(f"lit_glm: {self.name} fails ({reason}); the run goes on", file=sys.stderr, flush=True)
                if number < _TRIES and self._lost == 0:  # a server that stays away is not waited for at every point
                    time.sleep(_PAUSE_S)
        self._lost += 1
