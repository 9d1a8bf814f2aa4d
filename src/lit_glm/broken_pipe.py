"""A command goes on when nobody reads any more: `train | head -1` is no reason to end a run."""

import os
import sys
from typing import Any


class _BrokenPipeSafeStream:
    """A stream that is written to as long as somebody reads, and to nowhere after that."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._redirect_to_devnull()
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        # The descriptor, so that what waits in the stream's buffer, and the interpreter's last flush, end there too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_broken_pipe() -> None:
    """Have this process's output and errors end nothing when they are closed; called at a command's entry."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _BrokenPipeSafeStream):
            setattr(sys, name, _BrokenPipeSafeStream(stream))
