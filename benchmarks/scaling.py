"""How does the cost of a step grow with candidates, context, bs, layers and ranks? A table, and a plot beside it.

Both scorings at width 256, one quantity varied at a time, in turn round by round; each figure is a ratio to the first
value of the same scoring in the same round. Ranks: `train` on 1x1 and 1x2 with one thread a rank, samples a second;
and how evenly 8 ranks share a global batch, counted and not timed, with and without `data.balance_ranks`.

    python benchmarks/scaling.py --rounds 3 --plot benchmarks/scaling.svg
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import corpus
import torch

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.datamodule import RecordDataModule
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.metrics.flops import FlopCounter
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores

SMALL = ["model.hidden_size=256", "model.num_attention_heads=4", "model.vocab_size=30592"]
VARIED: Dict[str, List[int]] = {
    "candidates": [3, 6, 12, 24],
    "context": [60, 120, 240, 400],
    "bs": [1, 2, 4, 8],
    "layers": [2, 4, 8],
}
USUAL = {"candidates": 6, "context": 120, "bs": 2, "layers": 2}


def step_seconds(scoring: str, candidates: int, context: int, bs: int, layers: int, number: int) -> float:
    """Forward and backward of one batch."""
    published = scoring == "published"
    more = [f"scoring={scoring}", f"model.num_layers={layers}"]
    config = validate_config(compose_config("train", [*SMALL, *more]), TrainConfig)
    split = open_dataset(corpus.cached(context=context, candidates=candidates), False, None)
    indices = [(number * bs + i) % len(split) for i in range(bs)]
    batch: Any = collate_padded(split, indices, 512) if published else collate_packed(split, indices)
    torch.manual_seed(0)
    glm, _ = build_glm(config.model, CPURuntime().model_ops())
    seconds = []
    for _ in range(2):  # the first makes ready
        start = time.perf_counter()
        candidate_loss(candidate_scores(glm.train(), batch, TRAIN_MASK)).backward()
        seconds.append(time.perf_counter() - start)
    return seconds[1]


def samples_per_second(topology: str) -> float:
    """p_core of a short quickstart with one thread a rank."""
    with tempfile.TemporaryDirectory() as folder:
        more = [f"topology={topology}", "run.max_steps=60", f"hydra.run.dir={folder}"]
        command = [sys.executable, "-m", "lit_glm.train", "experiment=quickstart", "run.target_accuracy=2", *more]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return float(json.loads((Path(folder) / "result.json").read_text())["p_core"])


def imbalance(balance: str) -> float:
    """By how much the rank with the most rows exceeds the mean, 1x8, bs 8, mean over the steps of an epoch."""
    overrides = ["hardware=r300", "hardware.runtime=simulated", "topology=1x8", "bs=8", f"data.balance_ranks={balance}"]
    config = validate_config(compose_config("train", overrides), TrainConfig)
    split = open_dataset(corpus.cached(examples=2000), False, None)
    data = RecordDataModule(config, split, lambda: 0, False, lambda: None)
    ratio = FlopCounter(config, split, data.sampler(0, 0)).rank_imbalance(2000 // 64)
    assert ratio is not None
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    throughput: Dict[str, Dict[str, List[float]]] = {}
    for name, values in VARIED.items():
        for scoring in ("shared_context", "published"):
            rounds = []
            for number in range(given.rounds):
                seconds = [step_seconds(scoring, **{**USUAL, name: value}, number=number) for value in values]
                rounds.append([value / seconds[0] for value in seconds])
            throughput.setdefault(name, {})[scoring] = [statistics.median(column) for column in zip(*rounds)]
            shown = "  ".join(f"{v}: {r:.2f}" for v, r in zip(values, throughput[name][scoring]))
            print(f"{name:11} {scoring:15} {shown}", flush=True)
    speeds = [(samples_per_second("1x1"), samples_per_second("1x2")) for _ in range(given.rounds)]
    print(
        f"ranks: 1x2 / 1x1 samples a second, a thread a rank: {statistics.median(two / one for one, two in speeds):.2f}"
    )
    print(
        f"rank imbalance of 8 ranks: {imbalance('false'):.3f} as published, {imbalance('true'):.3f} with balance_ranks"
    )
    if given.plot:
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(11, 3), layout="constrained")
        for axes, (name, lines) in zip(canvas.subplots(1, len(throughput)), throughput.items()):
            for scoring, ratios in lines.items():
                axes.plot(VARIED[name], ratios, marker="o", label=scoring)
            axes.set(xlabel=name, ylabel="step time / first", xscale="log", yscale="log")
            axes.set_xticks(VARIED[name], [str(value) for value in VARIED[name]])
            axes.minorticks_off()
        axes.legend(frameon=False)
        canvas.savefig(str(given.plot))


if __name__ == "__main__":
    main()
