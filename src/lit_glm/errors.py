"""The two errors that people see without a traceback."""


class InputError(Exception):
    """Something that the user gave is wrong: a value, a name, a file. Exit status 2.

    The message says what was wrong, the value, where it came from and what to do.
    """

    exit_status = 2


class RunError(Exception):
    """The run itself failed: a rank died, a limit passed, a device vanished. Exit status 1."""

    exit_status = 1
