"""Output streams that do not end a run if they are closed or full, or if their encoding lacks a character."""

import os
import sys
from typing import Any, Optional


class SafeStream:
    """Stream wrapper that discards its output after the first failed write."""

    def __init__(self, stream: Any, error: Optional[str] = None) -> None:
        self._stream = stream
        self.error = error
        """Reason why the stream cannot be written; None if it can be, or if its reader closed the pipe."""

    def write(self, text: str) -> int:
        """Write a text; characters that the encoding lacks are written as escapes."""
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return int(self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # Redirect the descriptor, so that buffered text and the interpreter's last flush are discarded too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):  # `train | head -1`
            self.error = str(error.strerror)
            if self._stream is not sys.__stderr__:
                print(f"lit_glm: the output cannot be written ({self.error}); further output is lost", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_output() -> None:
    """Wrap stdout and stderr so that failed writes do not end the process; called at the start of a command."""
    for descriptor in (0, 1, 2):  # the next opened file would get a closed descriptor
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, SafeStream(open(os.devnull, "w", encoding="utf-8"), "it is closed"))  # noqa: SIM115
        elif not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def output_error() -> Optional[str]:
    """Return why standard output could not be written; None if it could."""
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)
