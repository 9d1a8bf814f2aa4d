"""`train` as one rank of a torchrun that the user has started: no ranks of its own, one run folder for all."""

import os
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.gc_pause import importing
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.launch import heartbeat
from lit_glm.launch.heartbeat import STALL_MARGIN_S, Watch, said_of, watching
from lit_glm.launch.launcher import ending_recorded, energy_recorded, node_watched
from lit_glm.launch.nodes import OuterRank
from lit_glm.launch.process_group import joined
from lit_glm.launch.worker import said
from lit_glm.process_utils import kill_children, leave
from lit_glm.runs.job_spec import Job
from lit_glm.runs.result import fail, is_complete
from lit_glm.runs.run_folder import taken

_FIRST_SPEAKS_S = 5.0


def _watched(config: TrainConfig, folder: Path, outer: OuterRank) -> Any:
    """End this rank when its node gives no sign of life, as a launcher of ours would; torchrun then ends the others.

    A node's first rank speaks first, if it can.
    """

    def end_this(where: List[str]) -> None:
        message = said_of(config, folder, where)
        fail(folder, message)  # the first rank may be the one that hangs
        print(f"lit_glm: {message}", file=sys.stderr, flush=True)
        kill_children()
        os._exit(1)

    here = range(outer.rank - outer.local_rank, outer.rank - outer.local_rank + config.topology.devices_per_node)
    margin = STALL_MARGIN_S if outer.local_rank == 0 else STALL_MARGIN_S + _FIRST_SPEAKS_S
    return watching(Watch(folder, here, config.run.stall_timeout_s + margin), end_this)


def run_outer(
    config: TrainConfig,
    outer: OuterRank,
    entry: float,
    find: Callable[[], Tuple[Path, bool]],
    composed: Dict[str, str],
    prepare_data: Callable[[], None],
) -> int:
    """Run this rank.

    Args:
        config: the run's.
        outer: which rank this is.
        entry: `time.monotonic()` at the entry of `train`.
        find: asked on the first rank for the run folder and whether it holds a run that goes on.
        composed: what .hydra/ is to hold.
        prepare_data: called on the first rank of each node, before any other reads data.

    Returns:
        The exit status.
    """
    with importing():
        from lit_glm.hardware import object_collectives
        from lit_glm.launch.rank_runner import run_rank

    folder = Path(os.devnull)

    def work() -> None:
        nonlocal folder
        with ExitStack() as keep:
            if outer.local_rank == 0:
                prepare_data()
            keep.enter_context(joined(config))
            told: Any = None
            if outer.rank == 0:
                run_dir, resumes = find()
                if resumes and is_complete(run_dir):
                    raise InputError(f"run.resume={run_dir}: the run is complete, there is nothing to do")
                first = Job(config, entry, sys.argv, resumes)
                keep.enter_context(taken(first, run_dir, composed))
                keep.enter_context(energy_recorded(first, run_dir))
                heartbeat.clear(run_dir)
                told = (str(run_dir.resolve()), resumes)
            if config.topology.world_size > 1:
                told = object_collectives.broadcast(
                    told, make_runtime(config.hardware, config.topology).device(outer.local_rank)
                )
            folder, resumes = Path(told[0]), told[1]
            job = Job(config, entry if outer.rank == 0 else time.monotonic(), sys.argv, resumes)
            node = outer.rank // config.topology.devices_per_node
            if outer.local_rank == 0 and node > 0:
                keep.enter_context(node_watched(job, folder, node))
            with _watched(config, folder, outer), ending_recorded(folder) if outer.rank == 0 else nullcontext():
                run_rank(job, folder)

    status = said(work, lambda: folder)
    if config.topology.world_size > 1:
        leave(status)
    return status
