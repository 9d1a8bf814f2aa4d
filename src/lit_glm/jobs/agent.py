"""torchrun without its report: the rank that failed has said why, and its exit status becomes the agent's."""

import ctypes
import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Run torchrun with this process's arguments."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # a job does not outlive the command that started it
    except (AttributeError, OSError):
        pass
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        # A rank that was asked to stop, or refused its input, says more than those that lost their peers by it.
        codes = [failure.exitcode for failure in failures]
        return next((code for code in codes if code in (2, 130, 143)), max(1, codes[0] if codes[0] > 0 else 1))
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
