"""What do Lightning, callbacks, logging and data add to a step, over a bare torch loop?

`train` and a bare loop (the same model, batches from the same kind of thread, forward, backward, clipping, AdamW) in
turn, each in a process of its own. What is added is the part of step_s in steps.csv that is not compute_s, and what
compute_s has beyond the bare loop's step: both as medians after the first fifth, in ms a step. A step of glm_tiny is
not much longer than what is added; its share is what counts at GLM-Large: --large measures a step of that shape, and
the share that the same milliseconds have of it.
Both give no memory back between steps: whether the C library does depends on what happens to lie on top of its heap,
and costs a bare loop at bs 64 more than all that is measured here.

    python benchmarks/overhead.py --bs 4,64 --steps 300 --rounds 3 --large
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
from typing import Dict, List

from lit_glm.threads import bound_spinning, threads_of

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_MMAP_THRESHOLD_": "20000000000"}
OVERRIDES = ["experiment=quickstart", "run.eval_interval_samples=100000000", "run.eval_start_samples=100000000"]


def bare(bs: int, steps: int) -> None:
    """Print the seconds of each step of a bare loop."""
    import torch

    from lit_glm.batches.ahead import Ahead
    from lit_glm.batches.collate import flat_batch
    from lit_glm.batches.compact import open_data
    from lit_glm.bench.lengths import Lengths
    from lit_glm.config.app import checked, compose
    from lit_glm.config.schema import TrainConfig
    from lit_glm.model.build import build_glm
    from lit_glm.model.scoring import TRAIN_MASK, choice_loss, score_table
    from lit_glm.record.synthetic import ensure
    from lit_glm.training.optimizer import make_optimizer

    config = checked(compose("train", [*OVERRIDES, f"bs={bs}"]), TrainConfig)
    ensure(config.data)
    split, _ = open_data(config.data, config.model)
    threads = threads_of(bs * float(Lengths.of(split).rows.mean()), config.model.hidden_size, 1, None)
    if threads is not None:
        torch.set_num_threads(threads)
    order = torch.randperm(len(split)).tolist()
    batches = Ahead(flat_batch(split, [order[(k * bs + i) % len(order)] for i in range(bs)]) for k in range(steps))
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


def trained(bs: str, steps: int, environment: Dict[str, str], more: List[str]) -> List[Dict[str, str]]:
    """Lines of steps.csv of a run."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"bs={bs}", f"run.max_steps={steps}", f"hydra.run.dir={folder}/run", *more]
        command = [sys.executable, "-m", "lit_glm.train", *OVERRIDES, *own]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        with (Path(folder) / "run" / "steps.csv").open() as file:
            return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bs", default="4,64")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="a step of GLM-Large too (needs 8 GiB)")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(int(given.bs), given.steps)
        return
    bound_spinning()  # as `train` does for itself: threads wait in the same way in both
    environment = {**os.environ, **ALLOCATOR}
    print("| bs | bare step ms | train step ms | beside compute ms | added ms (of each round) | waiting for data |")
    print("|---|---|---|---|---|---|")
    added: List[float] = []
    for bs in given.bs.split(","):
        rounds = []
        for _ in range(given.rounds):
            own = [sys.executable, __file__, "--bare", "--bs", bs, "--steps", str(given.steps)]
            shown = subprocess.run(own, check=True, capture_output=True, text=True, env=environment).stdout
            rows = trained(bs, given.steps, environment, [])
            step, compute, data = ([float(row[name]) for row in rows] for name in ("step_s", "compute_s", "data_s"))
            beside = [whole - part for whole, part in zip(step, compute)]
            rounds.append((settled(json.loads(shown)), settled(step), settled(beside), sum(data) / sum(step)))
        over = [1000 * (train - plain) for plain, train, _, _ in rounds]
        added += over
        plain, train, beside_s, waits = (statistics.median(column) for column in zip(*rounds))
        each = ", ".join(f"{value:.2f}" for value in over)
        times = f"{1000 * plain:.2f} | {1000 * train:.2f} | {1000 * beside_s:.2f}"
        print(f"| {bs} | {times} | {statistics.median(over):.2f} ({each}) | {waits:.2%} |", flush=True)
    if given.large:
        shape = ["model=glm_large", "model.vocab_size=1024", "model.init_std=0.02"]
        rows = trained("4", 6, environment, shape)
        step = settled([float(row["step_s"]) for row in rows])
        share = statistics.median(added) / 1000 / step
        print(f"a step of 24 layers x 1024 (vocabulary 1024), bs 4: {step:.2f} s; added to it: {share:.3%}")


if __name__ == "__main__":
    main()
