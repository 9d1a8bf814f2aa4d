"""What do Lightning, callbacks, logging and data cost over a bare torch loop, at glm_tiny?

`train` and a bare loop (the same model, batches made beforehand, forward, backward, clipping, AdamW) in turn, each in
a process of its own; the ratio is of the median step after the first fifth: step_s of steps.csv over the bare loop's.
A shared machine may run whole processes at another speed than the next: besides the median ratio of the pairs, the
ratio of the fastest `train` to the fastest bare loop is given.
Both give no memory back between steps: whether the C library does depends on what happens to lie on top of its heap,
and costs a bare loop at bs 64 more than all that is measured here.

    python benchmarks/overhead.py --bs 4,64 --steps 300 --rounds 3
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_MMAP_THRESHOLD_": "20000000000"}
OVERRIDES = ["experiment=quickstart", "run.eval_interval_samples=100000000", "run.eval_start_samples=100000000"]


def bare(bs: int, steps: int) -> None:
    """Print the seconds of each step of a bare loop."""
    import torch

    from lit_glm.batches.collate import flat_batch
    from lit_glm.batches.compact import open_data
    from lit_glm.config.app import checked, compose
    from lit_glm.config.schema import TrainConfig
    from lit_glm.model.build import build_glm
    from lit_glm.model.scoring import TRAIN_MASK, choice_loss, score_table
    from lit_glm.record.synthetic import ensure
    from lit_glm.training.optimizer import make_optimizer

    config = checked(compose("train", [*OVERRIDES, f"bs={bs}"]), TrainConfig)
    ensure(config.data)
    split, _ = open_data(config.data, config.model)
    order = torch.randperm(len(split)).tolist()
    batches = [flat_batch(split, [order[(k * bs + i) % len(order)] for i in range(bs)]) for k in range(steps)]
    glm, _ = build_glm(config.model)
    optimizer = make_optimizer(glm.train(), config.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        choice_loss(score_table(glm, batch, TRAIN_MASK)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def settled(seconds: List[float]) -> float:
    """Median after the first fifth."""
    return statistics.median(seconds[len(seconds) // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bs", default="4,64")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(int(given.bs), given.steps)
        return
    environment = {**os.environ, **ALLOCATOR}
    print("| bs | bare step ms | train step ms | train / bare | fastest / fastest | waiting for data |")
    print("|---|---|---|---|---|---|")
    for bs in given.bs.split(","):
        ratios, bares, trains, waits = [], [], [], []
        for _ in range(given.rounds):
            own = [sys.executable, __file__, "--bare", "--bs", bs, "--steps", str(given.steps)]
            shown = subprocess.run(own, check=True, capture_output=True, text=True, env=environment).stdout
            bares.append(settled(json.loads(shown)))
            with tempfile.TemporaryDirectory() as folder:
                more = [f"bs={bs}", f"run.max_steps={given.steps}", f"hydra.run.dir={folder}"]
                command = [sys.executable, "-m", "lit_glm.train", *OVERRIDES, *more]
                subprocess.run(command, check=True, capture_output=True, env=environment)
                with (Path(folder) / "steps.csv").open() as file:
                    rows = list(csv.DictReader(file))
            trains.append(settled([float(row["step_s"]) for row in rows]))
            waits.append(sum(float(row["data_s"]) for row in rows) / sum(float(row["step_s"]) for row in rows))
            ratios.append(trains[-1] / bares[-1])
        step, own_step, ratio = (statistics.median(values) for values in (bares, trains, ratios))
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        times = f"{1000 * step:.2f} | {1000 * own_step:.2f} | {ratio:.3f} {spread} | {min(trains) / min(bares):.3f}"
        print(f"| {bs} | {times} | {statistics.median(waits):.2%} |", flush=True)


if __name__ == "__main__":
    main()
