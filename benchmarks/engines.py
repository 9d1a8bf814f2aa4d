"""How fast is a training step and an evaluation, of what work, against the published implementation?

All engines take the same weights and the same batches in turn, in one process; every figure is a ratio to the reference
(benchmarks/reference.py: the published work) of the same round, or a share of a matrix product's speed in that round.
`--memory` measures each engine's peak in a process of its own instead, by the kernel's own count.

    python benchmarks/engines.py --shape 6x512 --bs 8 --rounds 1 --again 2     # warm: memory touched by the same batch
    python benchmarks/engines.py --shape large --bs 8 --engines shared_context,bf16 --rounds 4      # no reference
    python benchmarks/engines.py --shape large --bs 2 --memory
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import corpus
import torch
from reference import Reference

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.hardware.runtimes.cpu import CPURuntime, bf16_instructions
from lit_glm.metrics.flops import published_flops, shared_context_flops
from lit_glm.metrics.system_info import describe_machine
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.scoring import EVAL_MASK, TRAIN_MASK, candidate_loss, candidate_scores
from lit_glm.training.optimizer import make_optimizer

SHAPES = {
    "tiny": ["model=glm_tiny", "model.vocab_size=30592", "model.max_sequence_length=512", "model.init_std=0.02"],
    "6x512": ["model.num_layers=6", "model.hidden_size=512", "model.num_attention_heads=8"],
    "large": ["model=glm_large"],
}


class Engine:
    """One way of computing, on weights that no other has."""

    def __init__(self, name: str, config: TrainConfig, weights: Dict[str, Any]) -> None:
        self.name = name
        published = name in ("reference", "published")
        config.model.activation_checkpointing = published
        self.glm, _ = build_glm(config.model, CPURuntime().model_ops())
        self.glm.load_state_dict(weights)
        self.reference = Reference(self.glm) if name == "reference" else None
        self.optimizer = None if self.reference else make_optimizer(self.glm, config.optimizer)
        self.padded, self.half = published, name == "bf16"

    def step(self, batch: Any) -> float:
        """One update; returns the loss before it."""
        self.glm.train()
        if self.reference:
            return self.reference.step(batch)
        assert self.optimizer is not None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            loss = candidate_loss(candidate_scores(self.glm, batch, TRAIN_MASK))
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def evaluate(self, batch: Any) -> Any:
        """[B, C] scores."""
        self.glm.eval()
        if self.reference:
            return self.reference.evaluate(batch)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            return candidate_scores(self.glm, batch, EVAL_MASK, slice_size=10)


def highest_memory() -> float:
    """Largest resident memory of this process so far, GiB, as the kernel counts it."""
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) / 2**20 for line in file if line.startswith("VmHWM"))


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 3072 x 3072 matrices, the best of three by either of torch's libraries."""
    a, b = torch.ones(3072, 3072, dtype=dtype), torch.ones(3072, 3072, dtype=dtype)
    ways = (lambda: a @ b, lambda: CPURuntime().model_ops().linear(a, b, None))
    return 2 * 3072**3 / min(timed(way)[0] for way in ways for _ in range(3))


def timed(call: Any) -> Tuple[float, Any]:
    """Seconds, and what came back."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def given_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="6x512")
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", default="reference,published,shared_context,bf16")
    parser.add_argument("--parts", default="eval,train")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--again", type=int, default=1, help="each batch so many times in turn; the last one counts")
    parser.add_argument("--file", type=Path, help="HDF5 file of the published layout (default: generated)")
    parser.add_argument("--memory", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = given_arguments()
    names = given.engines.split(",")
    CPURuntime()  # as in `train`, before a thread starts: those that run already do not flush numbers below 1e-38
    if given.memory and len(names) > 1:
        for name in names:
            arguments = [*sys.argv, "--engines", name, "--rounds", "1", "--parts", "train"]
            subprocess.run([sys.executable, *arguments], check=True)
        return
    dropout = [f"model.hidden_dropout={given.dropout}", f"model.attention_dropout={given.dropout}"]
    config = validate_config(compose_config("train", [*SHAPES[given.shape], *dropout, "lr=1e-5"]), TrainConfig)
    file = given.file or corpus.cached()
    split = open_dataset(file, False, None)
    torch.manual_seed(0)
    weights = build_glm(config.model)[0].state_dict()
    engines = [Engine(name, config, weights) for name in names]
    del weights
    if given.memory:
        before = highest_memory()
        indices = range(given.bs)
        engines[0].step(collate_padded(split, indices, 512) if engines[0].padded else collate_packed(split, indices))
        highest = highest_memory()
        label = f"{given.shape} bs={given.bs} {names[0]:>15}"
        print(f"{label}: {before:.2f} GiB before, peak {highest:.2f} GiB", flush=True)
        return
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"bf16: {', '.join(bf16_instructions()) or 'no instructions for it'}; {given.shape}, bs={given.bs}, {file}")
    for engine in engines:  # the optimizer's state and the allocator's blocks: not counted
        engine.step(collate_padded(split, [0], 512) if engine.padded else collate_packed(split, [0]))
    measure(given, config, split, engines)


_TYPES = {False: torch.float32, True: torch.bfloat16}


def measure(given: argparse.Namespace, config: TrainConfig, split: Any, engines: List[Engine]) -> None:
    """All engines in turn over the same batches, a line each, and a table in the end."""
    seconds: Dict[Tuple[str, str], List[float]] = {}
    shares: Dict[Tuple[str, str], List[float]] = {}
    for number in range(given.rounds):
        indices = [(number * given.bs + i) % len(split) for i in range(given.bs)]
        flat, padded = collate_packed(split, indices), collate_padded(split, indices, 512)
        sequences = padded.score_shape[0] * padded.score_shape[1]
        flops = {
            True: float(published_flops(config.model, sequences, 512)),
            False: float(shared_context_flops(config.model, flat.context_lengths, flat.candidate_rows).sum()),
        }
        peaks = {half: peak(_TYPES[half]) for half in sorted({engine.half for engine in engines})}
        products = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {_TYPES[half]}" for half, speed in peaks.items())
        print(f"round {number}: {len(flat.tokens)} rows, {sequences} sequences of 512; products {products}", flush=True)
        for part in given.parts.split(","):
            for engine in engines:
                batch = padded if engine.padded else flat
                for _ in range(given.again):
                    elapsed, value = timed(lambda: (engine.step if part == "train" else engine.evaluate)(batch))  # noqa: B023
                seconds.setdefault((part, engine.name), []).append(elapsed)
                work = flops[engine.padded] / (1 if part == "train" else 3)
                shares.setdefault((part, engine.name), []).append(work / elapsed / peaks[engine.half])
                shown = f"loss {value:.6f}" if part == "train" else f"best {value.argmax(1).tolist()}"
                share = shares[part, engine.name][-1]
                print(f"  {part:5} {engine.name:>15} {elapsed:9.3f} s  {share:6.1%}  {shown}", flush=True)
    print(f"\n| {given.shape}, bs {given.bs} | engine | median s | reference / this | share of the product's speed |")
    print("|---|---|---|---|---|")
    for (part, name), values in seconds.items():
        ratio = "" if (part, "reference") not in seconds else f"{_ratio(seconds[part, 'reference'], values):.2f}x"
        share = statistics.median(shares[part, name])
        print(f"| {part} | {name} | {statistics.median(values):.3f} | {ratio} | {share:.0%} |")


def _ratio(reference: List[float], seconds: List[float]) -> float:
    return statistics.median(r / o for r, o in zip(reference, seconds))


if __name__ == "__main__":
    main()
