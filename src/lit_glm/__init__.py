"""Benchmark of a device: fine-tunes GLM on ReCoRD, and records speed and accuracy."""

import os
import signal
import sys
from typing import Any

__version__ = "0.2.0"


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process with a message and status 130 while a command is still importing its modules."""

    def end(number: int, _frame: Any) -> None:
        os.write(2, b"lit_glm: interrupted by SIGINT\n")
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, end)


if sys.argv[:1] == ["-m"] and any(word.startswith("lit_glm") for word in getattr(sys, "orig_argv", ["lit_glm"])):
    exit_on_interrupt()  # `python -m lit_glm.COMMAND` is importing this package; Python 3.8 does not tell which module
