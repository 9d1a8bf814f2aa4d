"""One rank of the doctor's all-reduce; the supervisor starts it as `-m lit_glm.preflight.all_reduce FOLDER`."""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict

import torch

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import RunError
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.launch.worker import rank_main
from lit_glm.process_utils import exit_now

_MIB = 16
_ROUNDS = 5


def measure_all_reduce(config: TrainConfig) -> Dict[str, Any]:
    """Check the sum of an all-reduce over the ranks, and time it."""
    runtime = make_runtime(config.hardware, config.topology)
    device = runtime.device(int(os.environ["LOCAL_RANK"]))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def seconds(tensor: torch.Tensor) -> float:
        times = []
        for _ in range(_ROUNDS):
            tensor.fill_(rank + 1.0)
            runtime.synchronize()
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            runtime.synchronize()
            times.append(time.perf_counter() - start)
            if float(tensor[0]) != ranks * (ranks + 1) / 2:
                raise RunError(
                    f"wrong sum over {ranks} ranks: {float(tensor[0]):g}, expected {ranks * (ranks + 1) / 2:g}"
                )
        return statistics.median(times)

    latency, long = seconds(torch.zeros(1, device=device)), seconds(torch.zeros(_MIB * 2**18, device=device))
    return {
        "ranks": ranks,
        "backend": runtime.backend,
        "mib": _MIB,
        "seconds": long,
        "latency_s": latency,
        "gib_per_s": _MIB / 1024 / long,
    }


if __name__ == "__main__":
    exit_now(rank_main(Path(sys.argv[1]), measure_all_reduce))
