"""`train` as one rank of a torchrun that the user has started: no ranks of its own, one run folder for all."""

import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Callable, List, Tuple

from lit_glm.alone import alone_in
from lit_glm.bench.result import COMPLETE, read_result
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes import make_runtime
from lit_glm.jobs.group import joined
from lit_glm.jobs.heartbeat import STALL_MARGIN_S, stalled, watch_this_process
from lit_glm.jobs.launch import ending_recorded, prepare_folder
from lit_glm.jobs.nodes import OuterRank
from lit_glm.jobs.spec import Job
from lit_glm.jobs.worker import fail, leave, run_rank, said

_FIRST_SPEAKS_S = 5.0


def _watch(config: TrainConfig, folder: Path, outer: OuterRank) -> Callable[[], None]:
    """End this rank when its node gives no sign of life, as a launcher of ours would; torchrun then ends the others.

    A node's first rank speaks first, if it can.
    """
    limit = config.run.stall_timeout_s

    def say(whereabouts: List[str]) -> None:
        message = stalled(limit, folder, whereabouts)
        fail(folder, message)  # the first rank may be the one that hangs
        print(f"lit_glm: {message}", file=sys.stderr, flush=True)

    here = range(outer.rank - outer.local_rank, outer.rank - outer.local_rank + config.topology.devices_per_node)
    margin = STALL_MARGIN_S if outer.local_rank == 0 else STALL_MARGIN_S + _FIRST_SPEAKS_S
    return watch_this_process(folder, here, limit + margin, say)


def run_outer(
    config: TrainConfig,
    outer: OuterRank,
    entry: float,
    find: Callable[[], Tuple[Path, bool]],
    prepare_data: Callable[[], None],
) -> int:
    """Run this rank.

    Args:
        config: the run's.
        outer: which rank this is.
        entry: `time.monotonic()` at the entry of `train`.
        find: asked on the first rank for the run folder and whether it holds a run that goes on.
        prepare_data: called on the first rank of each node, before any other reads data.

    Returns:
        The exit status.
    """
    from lit_glm.hardware import exchange

    def work() -> None:
        with ExitStack() as keep:
            if outer.local_rank == 0:
                prepare_data()
            keep.enter_context(joined(config))
            told: Any = None
            if outer.rank == 0:
                run_dir, resumes = find()
                result = read_result(run_dir) if resumes else None
                if result is not None and result.get("status") in COMPLETE:
                    raise InputError(f"run.resume={run_dir}: the run is complete, there is nothing to do")
                keep.enter_context(alone_in(run_dir))
                prepare_folder(Job(config, entry, sys.argv, resumes), run_dir)
                told = (str(run_dir.resolve()), resumes)
            if config.topology.world_size > 1:
                told = exchange.broadcast(told, make_runtime(config.hardware, config.topology).device(outer.local_rank))
            folder, resumes = Path(told[0]), told[1]
            job = Job(config, entry if outer.rank == 0 else time.monotonic(), sys.argv, resumes)
            end_watch = _watch(config, folder, outer)
            try:
                with ending_recorded(folder) if outer.rank == 0 else nullcontext():
                    run_rank(job, folder)
            finally:
                end_watch()

    status = said(work)
    if config.topology.world_size > 1:
        leave(status)
    return status
