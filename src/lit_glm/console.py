"""Output of a command: messages of the logger `lit_glm`, and streams that do not end a run if they cannot be written.

Modules log to `logging.getLogger(__name__)`; results of a command (tables, JSON) are printed. A program that imports
the package gets no handler: it configures the logger `lit_glm` as any other.
"""

import argparse
import logging
import os
import shutil
import sys
from functools import lru_cache
from typing import Any, Optional

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@lru_cache(maxsize=None)
def python_command() -> str:
    """Return how this interpreter is called from here: `python` where that is the one, else its path."""
    python = shutil.which("python")
    if python is not None and os.path.dirname(os.path.abspath(python)) == os.path.dirname(sys.executable):
        return "python"
    try:
        inside = os.path.relpath(sys.executable)
    except OSError:  # the working directory has been removed
        return sys.executable
    return sys.executable if inside.startswith("..") else inside


class MessageHandler(logging.Handler):
    """Handler that writes "lit_glm: MESSAGE" to stdout, from the level WARNING on to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message to the stream of this moment."""
        try:
            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            text = record.getMessage()
            if "python -m lit_glm" in text:
                text = text.replace("python -m lit_glm", f"{python_command()} -m lit_glm")
            print(f"lit_glm: {text}", file=stream, flush=True)
        except Exception:  # logging must not end a run
            self.handleError(record)


def install_message_handler() -> None:
    """Handle the messages of this process as a command does; $LIT_GLM_LOG sets the lowest level (default INFO)."""
    logger, level = logging.getLogger("lit_glm"), os.environ.get("LIT_GLM_LOG", "").upper() or "INFO"
    if not any(isinstance(handler, MessageHandler) for handler in logger.handlers):
        logger.addHandler(MessageHandler())
    logger.propagate = False
    logger.setLevel(level if level in _LEVELS else "INFO")
    if level not in _LEVELS:
        logger.warning(f"LIT_GLM_LOG={level}: must be one of {', '.join(_LEVELS)}; using INFO")


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
            self._stop_writing(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
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


class CommandParser(argparse.ArgumentParser):
    """Parser of a command; its help begins, as that of the other commands, with what it does and examples."""

    def __init__(self, name: str, header: str, **options: Any) -> None:
        super().__init__(name, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._header = header

    def format_help(self) -> str:
        """Return the header, the usage and the options."""
        return f"{self._header}\n\n{super().format_help()}"


def set_up_console() -> None:
    """Wrap stdout and stderr so that failed writes do not end the process, and handle messages of the loggers.

    Called at the start of a command and of a rank.
    """
    install_message_handler()
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


def progress_bar(text: str, *columns: Any, transient: bool = False) -> Any:
    """Return a progress bar on stderr, which is displayed on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parts, console = (TextColumn(text), BarColumn(), *columns, TimeRemainingColumn()), Console(file=sys.stderr)
    return Progress(*parts, console=console, disable=not sys.stderr.isatty(), transient=transient)


def output_error() -> Optional[str]:
    """Return why standard output could not be written; None if it could."""
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)
