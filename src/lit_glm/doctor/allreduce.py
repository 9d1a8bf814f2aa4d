"""One rank of the doctor's all-reduce; started under torchrun as `-m lit_glm.doctor.allreduce SPEC_DIR OUT_DIR`."""

import os
import statistics
import sys
import time
from pathlib import Path

from lit_glm.ending import die_with_parent, leave
from lit_glm.errors import RunError
from lit_glm.files import write_json
from lit_glm.hardware.runtimes import make_runtime
from lit_glm.jobs.group import joined
from lit_glm.jobs.signs import Heartbeat
from lit_glm.jobs.worker import said
from lit_glm.runs.job import Job

_MIB = 16
_ROUNDS = 5


def main(spec_dir: Path, out_dir: Path) -> int:
    """Sum over the ranks, check the sum, time it."""
    die_with_parent()
    config = Job.read(spec_dir).config
    Heartbeat(spec_dir, int(os.environ["RANK"]))

    def work() -> None:
        with joined(config):
            sum_up()

    def sum_up() -> None:
        import torch

        runtime = make_runtime(config.hardware, config.topology)
        device = runtime.device(int(os.environ["LOCAL_RANK"]))
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

        def seconds(tensor: "torch.Tensor") -> float:
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
                        f"the sum over {ranks} ranks came out as {float(tensor[0]):g}, not {ranks * (ranks + 1) / 2:g}"
                    )
            return statistics.median(times)

        latency, long = seconds(torch.zeros(1, device=device)), seconds(torch.zeros(_MIB * 2**18, device=device))
        if rank == 0:
            write_json(
                out_dir / "allreduce.json",
                {
                    "ranks": ranks,
                    "backend": runtime.backend,
                    "mib": _MIB,
                    "seconds": long,
                    "latency_s": latency,
                    "gib_per_s": _MIB / 1024 / long,
                },
            )
        torch.distributed.barrier()

    return said(work, lambda: spec_dir)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
