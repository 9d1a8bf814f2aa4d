"""Sum, broadcast and gather between all ranks of the topology, in the types that training uses.

Started by `check` as one rank under torchrun: `-m lit_glm.verify.collectives SPEC_DIR OUT_DIR`.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, List

from lit_glm.config.schema import TrainConfig
from lit_glm.ending import die_with_parent, leave
from lit_glm.errors import RunError
from lit_glm.files import write_json
from lit_glm.hardware.runtimes import make_runtime
from lit_glm.jobs.group import joined
from lit_glm.jobs.signs import Heartbeat
from lit_glm.jobs.worker import said
from lit_glm.runs.job import Job
from lit_glm.verify.check import Check

_LIMIT_S = 30.0
_MARGIN_S = 5.0
_COUNT = 100_003
"""Elements; no multiple of anything, so that a library's last, shorter piece is tried too."""
_FILE = "collectives.json"


def check(config: TrainConfig) -> Check:
    """Start all ranks of this node, and say what they found."""
    from lit_glm.jobs.launch import run_ranks
    from lit_glm.jobs.nodes import this_node

    if config.topology.world_size == 1:
        return Check("collectives", "skip", "one device: there is nothing to exchange (topology=1x8 and the like)")
    config.run.stall_timeout_s = config.run.rendezvous_timeout_s = _LIMIT_S
    with tempfile.TemporaryDirectory(prefix="lit_glm-verify-") as folder:
        job = Job(config, time.monotonic(), [])
        job.write(Path(folder))
        try:
            run_ranks(job, this_node(config.topology), Path(folder), Path(folder), __name__, _MARGIN_S)
        except RunError as error:
            advice = "look at the collective library, its variables, and the links between the cards"
            return Check("collectives", "fail", " ".join(str(error.summary or error).split())[:300], advice=advice)
    kinds = ", ".join(_name(dtype) for dtype in kinds_of(config))
    ranks = config.topology.world_size
    return Check("collectives", "ok", f"sum, broadcast and gather of {kinds} over {ranks} ranks are right")


def kinds_of(config: TrainConfig) -> List[Any]:
    """What training sends: gradients and losses, lengths, bytes."""
    import torch

    half = [torch.float16] if config.precision.name == "fp16" else []
    return [torch.float32, *half, torch.int64, torch.uint8]


def _name(dtype: Any) -> str:
    return str(dtype).replace("torch.", "")


def exchanged(rank: int, ranks: int, device: Any, kinds: List[Any]) -> List[str]:
    """Try every collective; what came out wrong, a line each.

    Every rank gives other numbers, so that one that is left out, doubled or out of order is seen.
    """
    import torch

    wrong = []

    def given(dtype: Any, of: int) -> Any:
        return (torch.arange(_COUNT, device=device) % 13 + 1 + 7 * of).to(dtype)

    for dtype in kinds:
        everyone = [given(dtype, one) for one in range(ranks)]
        if dtype is not torch.uint8:  # nobody sums bytes
            summed = given(dtype, rank)
            torch.distributed.all_reduce(summed)
            if not torch.equal(summed, torch.stack(everyone).sum(0).to(dtype)):
                wrong.append(f"the sum of {_name(dtype)} over {ranks} ranks is wrong on rank {rank}")
        for source in sorted({0, ranks - 1}):
            sent = given(dtype, rank)
            torch.distributed.broadcast(sent, source)
            if not torch.equal(sent, everyone[source]):
                wrong.append(f"the broadcast of {_name(dtype)} from rank {source} is wrong on rank {rank}")
        gathered = [torch.zeros_like(everyone[0]) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, given(dtype, rank))
        wrong += [
            f"the gathering of {_name(dtype)} is wrong on rank {rank} for rank {one}'s part"
            for one in range(ranks)
            if not torch.equal(gathered[one], everyone[one])
        ]
    return wrong


def main(spec_dir: Path, out_dir: Path) -> int:
    """One rank."""
    die_with_parent()
    config = Job.read(spec_dir).config
    Heartbeat(spec_dir, int(os.environ["RANK"]))

    def work() -> None:
        with joined(config):
            import torch

            device = make_runtime(config.hardware, config.topology).device(int(os.environ["LOCAL_RANK"]))
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            wrong = exchanged(rank, ranks, device, kinds_of(config))
            if wrong:
                raise RunError("; ".join(wrong), summary="; ".join(wrong))
            if rank == 0:
                write_json(out_dir / _FILE, {"ranks": ranks})
            torch.distributed.barrier()

    return said(work, lambda: spec_dir)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
