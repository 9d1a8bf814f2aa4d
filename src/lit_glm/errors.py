"""The two errors that people see without a traceback."""

from typing import List


class InputError(Exception):
    """Something that the user gave is wrong: a value, a name, a file. Exit status 2.

    The message says what was wrong, the value, where it came from and what to do.
    """

    exit_status = 2


class RunError(Exception):
    """The run itself failed: a rank died, a limit passed, a device vanished. Exit status 1."""

    exit_status = 1

    def __init__(self, message: str, summary: str = "") -> None:
        """Say what happened.

        Args:
            message: all of it, for the screen.
            summary: in a few words, for result.json; "": the message.
        """
        super().__init__(message)
        self.summary = summary


def exception_chain(error: BaseException) -> List[BaseException]:
    """List an error and its causes; the chain may be a cycle (omegaconf under a debugger, or with OC_CAUSE=1)."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain
