"""Call of a function in a child process, so that a damaged file that crashes a C library does not end the caller.

The child runs this module; it receives function and arguments pickled, and sends back progress and result.
"""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Callable, Optional

from lit_glm.errors import InputError, first_line

_TIMEOUT_S = 300.0
"""Seconds without a message from the child: a library may loop forever on a damaged file."""
_MAX_ADDRESS_SPACE_BYTES = 2**34
"""Limit of the child's address space: a damaged size must not exhaust the machine's memory."""
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
ReportProgress = Callable[[int, int], None]
"""Callback with (done, total)."""


def call_isolated(function: Callable[..., Any], *arguments: Any, progress: Optional[ReportProgress] = None) -> Any:
    """Call a function in a child process.

    Args:
        function: function that can be imported by name; its last parameter is a `ReportProgress`.
        arguments: its other arguments; they and the result must be picklable.
        progress: called with the progress.

    Returns:
        The result of the function.

    Raises:
        InputError: if the function raised one, or the process died; gives the cause.
        OSError: if the output of the function cannot be written.
    """
    python_path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    reading, writing = os.pipe()
    answers = Connection(reading, writable=False)
    child = subprocess.Popen(
        [sys.executable, "-m", "lit_glm.isolated_process", str(writing)],
        stdin=subprocess.PIPE,
        stdout=2,  # what libraries print
        env={**os.environ, "PYTHONPATH": python_path},
        pass_fds=(writing,),
    )
    os.close(writing)
    failure = ""
    try:
        assert child.stdin is not None
        pickle.dump((function.__module__, function.__qualname__, arguments), child.stdin)
        child.stdin.close()
        while answers.poll(_TIMEOUT_S):
            kind, value = answers.recv()
            if kind == "returned":
                return value
            if kind == "refused":
                raise InputError(value)
            if kind == "failed":
                raise OSError(value)
            if progress is not None:
                progress(*value)
        failure = f"did not respond for {_TIMEOUT_S:g} s"
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        status = child.wait()
        failure = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    finally:
        child.kill()
        child.wait()
        answers.close()
    raise InputError(f"{arguments[0]}: the process that read it {failure}: the file is damaged")


def main() -> None:
    """Run the child: call the function, and send progress and result to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports Ctrl-C
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MAX_ADDRESS_SPACE_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, hard))
    answers = Connection(int(sys.argv[1]), readable=False)
    module, name, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 (of our own parent)

    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        answers.send(("returned", function(*arguments, lambda done, total: answers.send(("progress", (done, total))))))
    except InputError as error:
        answers.send(("refused", str(error)))
    except OSError as error:
        if error.errno in _WRITE_ERRNOS or "requested and" in str(error):  # numpy's message for a full disk
            answers.send(("failed", str(error)))
        else:
            answers.send(("refused", f"{arguments[0]}: cannot be read ({error})"))
    except Exception as error:  # a damaged file fails in many ways inside its library
        reason = first_line(error)
        message = f"{arguments[0]}: damaged, or not a file of this kind ({type(error).__name__}: {reason})"
        answers.send(("refused", message))


if __name__ == "__main__":
    main()
