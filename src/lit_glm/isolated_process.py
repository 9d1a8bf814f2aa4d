"""Calls of functions in a child process, so that a damaged file that crashes a C library does not end the caller.

The child runs this module; it receives functions and arguments pickled, and sends back progress and results.
"""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Callable, Iterator, List, Optional, Tuple

from lit_glm.errors import InputError, first_line

_TIMEOUT_S = 300.0
"""Seconds without a message from the child: a library may loop forever on a damaged file."""
_MAX_ADDRESS_SPACE_BYTES = 2**34
"""Limit of the child's address space: a damaged size must not exhaust the machine's memory."""
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
ReportProgress = Callable[[int, int], None]
"""Callback with (done, total)."""


class _Child:
    """A child process that runs one function after the other, until its standard input is closed."""

    def __init__(self) -> None:
        python_path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
        reading, writing = os.pipe()
        self._answers = Connection(reading, writable=False)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lit_glm.isolated_process", str(writing)],
            stdin=subprocess.PIPE,
            stdout=2,  # what libraries print
            env={**os.environ, "PYTHONPATH": python_path},
            pass_fds=(writing,),
        )
        os.close(writing)
        self.is_usable = True
        """Whether the child may run another function: not after an error, which a library may not have survived."""

    def call(self, function: Callable[..., Any], arguments: Tuple[Any, ...], progress: Optional[ReportProgress]) -> Any:
        self.is_usable = False
        try:
            assert self._process.stdin is not None
            pickle.dump((function.__module__, function.__qualname__, arguments), self._process.stdin)
            self._process.stdin.flush()
            while self._answers.poll(_TIMEOUT_S):
                kind, value = self._answers.recv()
                if kind == "returned":
                    self.is_usable = True
                    return value
                if kind == "refused":
                    raise InputError(value)
                if kind == "failed":
                    raise OSError(value)
                if progress is not None:
                    progress(*value)
            failure = f"did not respond for {_TIMEOUT_S:g} s"
        except (EOFError, pickle.UnpicklingError, BrokenPipeError):
            status = self._process.wait()
            failure = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        raise InputError(f"{arguments[0]}: the process that read it {failure}: the file is damaged")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()


_shared: "ContextVar[Optional[List[_Child]]]" = ContextVar("_shared", default=None)
"""Children of the enclosing `share_isolated_process`; the last one may be usable."""


@contextmanager
def share_isolated_process() -> Iterator[None]:
    """Run all isolated calls inside the block in one child process, which starts with the first of them.

    A child takes a quarter of a second to start, most of it for numpy and h5py.
    """
    if _shared.get() is not None:
        yield
        return
    children: List[_Child] = []
    token = _shared.set(children)
    try:
        yield
    finally:
        _shared.reset(token)
        for child in children:
            child.close()


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
    children = _shared.get()
    if children is None:
        with share_isolated_process():
            return call_isolated(function, *arguments, progress=progress)
    if not children or not children[-1].is_usable:
        children.append(_Child())
    return children[-1].call(function, arguments, progress)


def main() -> None:
    """Run the child: call the functions that the parent names, and send progress and results to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports Ctrl-C
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MAX_ADDRESS_SPACE_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, hard))
    answers = Connection(int(sys.argv[1]), readable=False)
    with suppress(EOFError):  # the parent has closed its end
        while True:
            module, name, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 (of our own parent)
            _run(module, name, arguments, answers)


def _run(module: str, name: str, arguments: Tuple[Any, ...], answers: Connection) -> None:
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
