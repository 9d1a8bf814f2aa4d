"""torchrun without its report: the rank that failed has said why, and its exit status becomes the agent's."""

import ctypes
import logging
import signal
import sys
from typing import List

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
    except RuntimeError as error:  # the nodes did not meet, or lost each other before their ranks ran
        print(f"lit_glm: {_place(sys.argv[1:])} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
        return 1
    return 0


def _place(arguments: List[str]) -> str:
    given = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    return (
        f"rendezvous failed on node {given['node_rank']}: {given['nnodes']} nodes were to meet at "
        f"{given['master_addr']}:{given['master_port']} (run.rendezvous_timeout_s, "
        f"{given['rdzv_conf'].rsplit('=', 1)[-1]} s). Was the same command started on every node, and can this one "
        "reach that address and port?"
    )


if __name__ == "__main__":
    sys.exit(main())
