"""A command goes on when its output is closed, full, or in an encoding that lacks a letter: no reason to end a run."""

import os
import sys
from typing import Any, Optional


class SafeStream:
    """A stream that is written to as long as that works, and to nowhere after that."""

    def __init__(self, stream: Any, error: Optional[str] = None) -> None:
        self._stream = stream
        self.error = error
        """Why it cannot be written; None: it can, or its reader has had enough."""

    def write(self, text: str) -> int:
        """As the stream's; letters that its encoding lacks are written as escapes."""
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return int(self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # The descriptor, so that what waits in the stream's buffer, and the interpreter's last flush, end there too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):  # `train | head -1`
            self.error = str(error.strerror)
            if self._stream is not sys.__stderr__:
                print(f"lit_glm: the output cannot be written ({self.error}); it is lost from here on", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_output() -> None:
    """Have this process's output and errors end nothing; called at a command's entry."""
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
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
    """Why standard output could not be written; None where it could."""
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)
