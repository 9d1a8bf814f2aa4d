"""Check of all-reduce, broadcast and all-gather across all ranks of the topology, in the dtypes that training uses.

`verify` and `doctor` start each rank by the supervisor: `-m lit_glm.verification.collectives_check FOLDER`.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import RunError
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.launch.worker import rank_main, run_on_all_ranks
from lit_glm.process_utils import exit_now

_LIMIT_S = 30.0
_COUNTS = (100_003, 7_000_003)
"""Numbers of elements: primes, so that the shorter last chunk of a library is tested too. DDP sums 25 MiB at a time."""
_MIB, _ROUNDS = 16, 5
COLLECTIVES_MODULE = "lit_glm.verification.collectives_check"


def check_collectives(config: TrainConfig) -> CheckResult:
    """Run the collectives on all ranks of this node and return the result."""
    ranks = config.topology.world_size
    if ranks == 1:
        return CheckResult(
            "collectives", "skip", "one device: no collectives; use a topology with several, such as topology=1x8"
        )
    try:
        run_on_all_ranks(config, COLLECTIVES_MODULE, _LIMIT_S)
    except RunError as error:
        advice = "check the collective library, its environment variables, and the links between the devices"
        return CheckResult("collectives", "fail", " ".join(str(error.summary or error).split())[:300], advice)
    kinds = ", ".join(_dtype_name(dtype) for dtype in training_dtypes(config))
    return CheckResult("collectives", "ok", f"all-reduce, broadcast, all-gather of {kinds}: correct on {ranks} ranks")


def training_dtypes(config: TrainConfig) -> List[Any]:
    """Return the dtypes that training communicates: gradients (fp16 if the device has it), losses, lengths, bytes."""
    half = [torch.float16] if "fp16" in config.hardware.precisions else []
    return [torch.float32, *half, torch.int64, torch.uint8]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).replace("torch.", "")


def _numbers(dtype: Any, count: int) -> Any:
    """Return numbers that need all bits of a dtype's significand: rounding to fewer on the way changes them."""
    bits = {torch.float32: 24, torch.float16: 11, torch.uint8: 8}.get(dtype, 40)
    return (torch.arange(count) * 6_700_417 % (2**bits - 1) + 1).to(dtype)


def rank_contribution(dtype: Any, rank: int, ranks: int, device: Any, count: int = _COUNTS[0]) -> Any:
    """Return a rank's input: numbers at its own positions, zeros elsewhere, so that sums are exact in any dtype.

    A rank that is missing, duplicated or out of order shows up at its positions.
    """
    numbers = _numbers(dtype, count)
    return numbers.masked_fill(torch.arange(count) % ranks != rank, 0).to(device)


def run_collectives(rank: int, ranks: int, device: Any, kinds: List[Any], counts: Sequence[int] = _COUNTS) -> List[str]:
    """Run every collective, sums of gradients with each of the counts; return one message per wrong result."""
    wrong = []
    for dtype in kinds:
        for count in () if dtype is torch.uint8 else counts[: 1 + dtype.is_floating_point]:  # bytes are never summed
            summed = rank_contribution(dtype, rank, ranks, device, count)
            torch.distributed.all_reduce(summed)
            if not torch.equal(summed.cpu(), _numbers(dtype, count)):
                tensor_text = f"{count:,} {_dtype_name(dtype)}"
                wrong.append(f"all-reduce of {tensor_text} over {ranks} ranks is wrong on rank {rank}")
        for source in sorted({0, ranks - 1}):
            sent = rank_contribution(dtype, rank, ranks, device)
            torch.distributed.broadcast(sent, source)
            if not torch.equal(sent, rank_contribution(dtype, source, ranks, device)):
                wrong.append(f"broadcast of {_dtype_name(dtype)} from rank {source} is wrong on rank {rank}")
        contribution = rank_contribution(dtype, rank, ranks, device)
        gathered = [torch.zeros_like(contribution) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, contribution)
        wrong += [
            f"all-gather of {_dtype_name(dtype)} is wrong on rank {rank} for rank {other}'s part"
            for other in range(ranks)
            if not torch.equal(gathered[other], rank_contribution(dtype, other, ranks, device))
        ]
    return wrong


def rank_task(config: TrainConfig) -> Dict[str, Any]:
    """Run the collectives on one rank, and time an all-reduce."""
    runtime = make_runtime(config.hardware, config.topology)
    device = runtime.device(int(os.environ["LOCAL_RANK"]))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    counts = _COUNTS[:1] if runtime.simulated else _COUNTS  # there many ranks may share one machine
    wrong = run_collectives(rank, ranks, device, training_dtypes(config), counts)
    if wrong:
        raise RunError("; ".join(wrong), summary="; ".join(wrong))

    def seconds(count: int) -> float:
        tensor, times = torch.zeros(count, device=device), []
        for _ in range(_ROUNDS):
            runtime.synchronize()
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            runtime.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return {
        "ranks": ranks,
        "backend": runtime.backend,
        "mib": _MIB,
        "seconds": seconds(_MIB * 2**18),
        "latency_s": seconds(1),
    }


if __name__ == "__main__":
    exit_now(rank_main(Path(sys.argv[1]), rank_task))
