"""Sum, broadcast and gather between all ranks of the topology, in the types that training uses.

Started by `check` as one rank under torchrun: `-m lit_glm.verification.collectives_check FOLDER FOLDER`.
"""

import os
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import RunError
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.launch.all_ranks import rank_main, run_on_all_ranks
from lit_glm.process_utils import exit_now

_LIMIT_S = 30.0
_COUNT = 100_003
"""Elements; no multiple of anything, so that a library's last, shorter piece is tried too."""


def check_collectives(config: TrainConfig) -> CheckResult:
    """Start all ranks of this node, and say what they found."""
    ranks = config.topology.world_size
    if ranks == 1:
        return CheckResult(
            "collectives", "skip", "one device: there is nothing to exchange (topology=1x8 and the like)"
        )
    try:
        run_on_all_ranks(config, __name__, _LIMIT_S)
    except RunError as error:
        advice = "look at the collective library, its variables, and the links between the cards"
        return CheckResult("collectives", "fail", " ".join(str(error.summary or error).split())[:300], advice)
    kinds = ", ".join(_dtype_name(dtype) for dtype in training_dtypes(config))
    return CheckResult("collectives", "ok", f"sum, broadcast and gather of {kinds} over {ranks} ranks are right")


def training_dtypes(config: TrainConfig) -> List[Any]:
    """What training sends: gradients (halves too, where the chip trains in them), losses, lengths, bytes."""
    half = [torch.float16] if "fp16" in config.hardware.precisions else []
    return [torch.float32, *half, torch.int64, torch.uint8]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).replace("torch.", "")


def rank_contribution(dtype: Any, rank: int, ranks: int, device: Any) -> Any:
    """What a rank gives: numbers at places of its own, zeros elsewhere, so that sums of any type are exact.

    A rank that is left out, doubled or out of order is seen at its places.
    """
    places = torch.arange(_COUNT, device=device)
    return torch.where(places % ranks == rank, places % 13 + 1, torch.zeros_like(places)).to(dtype)


def run_collectives(rank: int, ranks: int, device: Any, kinds: List[Any]) -> List[str]:
    """Try every collective; what came out wrong, a line each."""
    wrong = []
    for dtype in kinds:
        if dtype is not torch.uint8:  # nobody sums bytes
            summed = rank_contribution(dtype, rank, ranks, device)
            torch.distributed.all_reduce(summed)
            if not torch.equal(summed, (torch.arange(_COUNT, device=device) % 13 + 1).to(dtype)):
                wrong.append(f"the sum of {_dtype_name(dtype)} over {ranks} ranks is wrong on rank {rank}")
        for source in sorted({0, ranks - 1}):
            sent = rank_contribution(dtype, rank, ranks, device)
            torch.distributed.broadcast(sent, source)
            if not torch.equal(sent, rank_contribution(dtype, source, ranks, device)):
                wrong.append(f"the broadcast of {_dtype_name(dtype)} from rank {source} is wrong on rank {rank}")
        own = rank_contribution(dtype, rank, ranks, device)
        gathered = [torch.zeros_like(own) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, own)
        wrong += [
            f"the gathering of {_dtype_name(dtype)} is wrong on rank {rank} for rank {one}'s part"
            for one in range(ranks)
            if not torch.equal(gathered[one], rank_contribution(dtype, one, ranks, device))
        ]
    return wrong


def rank_task(config: TrainConfig) -> Dict[str, Any]:
    """One rank's part."""
    device = make_runtime(config.hardware, config.topology).device(int(os.environ["LOCAL_RANK"]))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    wrong = run_collectives(rank, ranks, device, training_dtypes(config))
    if wrong:
        raise RunError("; ".join(wrong), summary="; ".join(wrong))
    return {"ranks": ranks}


if __name__ == "__main__":
    exit_now(rank_main(Path(sys.argv[1]), rank_task))
