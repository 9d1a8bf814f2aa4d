"""What is the time of a training step spent on, kernel by kernel?

torch's profiler over the second step of an engine (the first makes ready), by the time of a kernel itself, without
what it calls. The profiler's own cost is in it: read shares.

    python benchmarks/kernels.py --shape 6x512 --bs 8 --engine shared_context
"""

import argparse
from pathlib import Path

import corpus
import torch
from engines import SHAPES, Engine
from torch.profiler import ProfilerActivity, profile

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.model.checkpoint import build_glm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="6x512")
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--engine", choices=("reference", "published", "shared_context", "bf16"), required=True)
    parser.add_argument("--lines", type=int, default=12)
    parser.add_argument("--file", type=Path, help="HDF5 file of the published layout (default: generated)")
    given = parser.parse_args()
    config = validate_config(compose_config("train", [*SHAPES[given.shape], "lr=1e-5"]), TrainConfig)
    split = open_dataset(given.file or corpus.cached(), False, None)
    torch.manual_seed(0)
    engine = Engine(given.engine, config, build_glm(config.model, CPURuntime().model_ops())[0].state_dict())
    indices = range(given.bs)
    batch = collate_padded(split, indices, 512) if engine.padded else collate_packed(split, indices)
    engine.step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.step(batch)
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_cpu_time_total)
    total = sum(kernel.self_cpu_time_total for kernel in kernels)
    print(f"| {given.shape}, bs {given.bs}, {given.engine}: {total / 1e6:.2f} s | calls | share |")
    print("|---|---|---|")
    for kernel in kernels[: given.lines]:
        print(f"| {kernel.key} | {kernel.count} | {kernel.self_cpu_time_total / total:.1%} |")


if __name__ == "__main__":
    main()
