"""Calls of a function on all ranks of a topology outside a run: all-reduce for doctor, collectives for verify."""

import json
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from lit_glm.atomic_files import write_json
from lit_glm.config.schema import TrainConfig
from lit_glm.console import set_up_console
from lit_glm.launch.heartbeat import Heartbeat
from lit_glm.launch.process_group import process_group
from lit_glm.launch.rendezvous import resolve_node
from lit_glm.launch.signals import StopRequest
from lit_glm.launch.supervisor import run_ranks
from lit_glm.launch.worker import exit_rank, run_and_report_errors
from lit_glm.runs.job_spec import JobSpec

_FILE = "found.json"
_MARGIN_S = 3.0


def run_on_all_ranks(config: TrainConfig, module: str, limit_s: float) -> Optional[Dict[str, Any]]:
    """Start the ranks of this node with a module that calls `rank_main`.

    Args:
        config: topology and hardware; its timeouts are overwritten.
        module: module that each rank runs.
        limit_s: timeout in seconds of heartbeats and of the rendezvous.

    Returns:
        The result of rank 0; None on secondary nodes.

    Raises:
        InputError, RunError: the error of a rank.
    """
    config.run.stall_timeout_s = config.run.rendezvous_timeout_s = limit_s
    with tempfile.TemporaryDirectory(prefix="lit_glm-trial-") as name:
        folder = Path(name)
        plain = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)})
        job = JobSpec(plain, time.monotonic(), [])
        job.write(folder)
        node = resolve_node(config.topology, config.hardware.runtime == "simulated")
        run_ranks(job, node, folder, module, _MARGIN_S)
        if node.rank > 0:
            return None
        found: Dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return found


def rank_main(folder: Path, work: Callable[[TrainConfig], Dict[str, Any]]) -> int:
    """Call `work` on this rank after all ranks have joined; write what rank 0 returns to `folder`.

    Returns:
        The exit status.
    """
    set_up_console()
    config = JobSpec.read(folder).config
    beat = Heartbeat(folder, int(os.environ["RANK"]))

    def join_and_work() -> None:
        with stop.interruptible(), process_group(config):
            beat()
            import torch

            found = work(config)
            if torch.distributed.get_rank() == 0:
                write_json(folder / _FILE, found)
            torch.distributed.barrier()

    with StopRequest(config.run.shutdown_timeout_s, exit_rank) as stop:
        return run_and_report_errors(join_and_work, lambda: folder, stop)
