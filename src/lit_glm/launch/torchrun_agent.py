"""torchrun, whose exit status is that of the rank that says most: the rank itself has said why."""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lit_glm.broken_pipe import ignore_broken_pipe
from lit_glm.compat import skip_exit_barrier_on_failure
from lit_glm.launch.signals import EXIT_STATUS
from lit_glm.runs.error_files import report_killed_rank

_MARGIN_S = 5.0
_CAUSE_EXIT_CODES = (2, *EXIT_STATUS.values())
"""Of ranks that refused their input, or were asked to stop: more than those say that lost their peers by it."""


def main() -> int:
    """Run torchrun with this process's arguments."""
    ignore_broken_pipe()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    skip_exit_barrier_on_failure()
    threading.Thread(target=_enforce_rendezvous_timeout, args=(sys.argv[1:],), daemon=True).start()
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:
                report_killed_rank(Path(sys.argv[-2]), rank, -failure.exitcode)
        codes = [failure.exitcode for failure in failures]
        return next((code for code in codes if code in _CAUSE_EXIT_CODES), max(1, codes[0]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RuntimeError, TimeoutError) as error:  # the nodes did not meet, or lost each other before their ranks ran
        _print_rendezvous_error(sys.argv[1:], str(error).splitlines()[0])
        return 1
    return 0


def _options(arguments: List[str]) -> Dict[str, str]:
    return dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)


def _enforce_rendezvous_timeout(arguments: List[str]) -> None:
    """End this agent when the nodes have not met in time: torch 1.12 then waits 300 s more, whatever its limit is."""
    limit = float(_options(arguments)["rdzv_conf"].rsplit("=", 1)[-1]) + _MARGIN_S
    begun = time.monotonic()
    while not psutil.Process().children():  # ranks: they start when the nodes have met
        if time.monotonic() - begun > limit:
            _print_rendezvous_error(arguments, "nobody came")
            os._exit(1)
        time.sleep(0.5)


def _print_rendezvous_error(arguments: List[str], reason: str) -> None:
    given = _options(arguments)
    print(
        f"lit_glm: rendezvous failed on node {given['node_rank']} ({reason}): {given['nnodes']} nodes were to meet at "
        f"{given['master_addr']}:{given['master_port']} (run.rendezvous_timeout_s, "
        f"{given['rdzv_conf'].rsplit('=', 1)[-1]} s). Was the same command started on every node, and can this one "
        "reach that address and port?",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
