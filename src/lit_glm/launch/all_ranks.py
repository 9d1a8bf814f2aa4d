"""Something that all ranks of a topology do once, outside any run: a sum for the doctor, collectives for verify."""

import json
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from lit_glm.atomic_files import write_json
from lit_glm.config.schema import TrainConfig
from lit_glm.launch.heartbeat import Heartbeat
from lit_glm.launch.nodes import resolve_node
from lit_glm.launch.process_group import process_group
from lit_glm.launch.signals import StopRequest
from lit_glm.launch.supervisor import run_ranks
from lit_glm.launch.worker import exit_rank, run_and_report_errors
from lit_glm.runs.job_spec import JobSpec

_FILE = "found.json"
_MARGIN_S = 3.0


def run_on_all_ranks(config: TrainConfig, module: str, limit_s: float) -> Optional[Dict[str, Any]]:
    """Start the ranks of this node with a module whose main is `as_rank`.

    Args:
        config: the topology and the chip; its time limits are changed.
        module: what each rank runs.
        limit_s: how long a rank may be silent, and how long nodes wait for each other.

    Returns:
        What the first rank has found; None on another node than its.

    Raises:
        InputError, RunError: what a rank has said.
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
    """A rank's part: `work`, with all ranks joined; what the first one returns is what has been found.

    Returns:
        The exit status.
    """
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
