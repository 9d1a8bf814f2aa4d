"""Errors that are printed without a traceback."""

from typing import List


class InputError(Exception):
    """Invalid user input: a value, a name or a file. Exit status 2.

    The message states what is wrong, the value, where it came from and what to do.
    """

    exit_status = 2


class RunError(Exception):
    """Failure of the run itself: a rank died, a timeout expired, a device was lost. Exit status 1."""

    exit_status = 1

    def __init__(self, message: str, summary: str = "") -> None:
        """Create the error.

        Args:
            message: full message for the terminal.
            summary: short form for result.json; "": use the message.
        """
        super().__init__(message)
        self.summary = summary


def exception_chain(error: BaseException) -> List[BaseException]:
    """List an error and its causes; the chain may be a cycle (omegaconf under a debugger, or with OC_CAUSE=1)."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message, at most 200 characters; its class if it has no text."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:197]}..."
