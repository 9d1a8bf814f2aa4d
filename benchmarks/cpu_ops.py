"""What does each operation that a CPU computes in its own way gain, as a share of a training step?

One model takes the same batch with all operations of `lit_glm.hardware.runtimes.cpu_ops`, and in turn with one of them
replaced by torch's own. The gain is the median over the rounds of (time without / time with) - 1.

    python benchmarks/cpu_ops.py --model glm_large --bs 4 --rounds 5
    python benchmarks/cpu_ops.py --model glm_large --bs 1 --scoring published --precisions fp32 --rounds 3
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import corpus
import torch

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.hardware.runtimes.cpu import CPURuntime, bf16_instructions
from lit_glm.metrics.system_info import describe_machine
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.glm import GLM
from lit_glm.model.runtime_ops import TORCH_OPS, RuntimeOps
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores
from lit_glm.training.optimizer import make_optimizer


def use(glm: GLM, ops: RuntimeOps) -> None:
    """Let a model call other operations from now on."""
    glm.ops = ops
    for module in glm.modules():
        if hasattr(module, "_product"):
            module._product = ops.linear
        if hasattr(module, "_dropout"):
            module._dropout = ops.dropout


def variants(ops: RuntimeOps) -> Dict[str, RuntimeOps]:
    """Return the operations of the CPU, and by name those with one of them left out."""
    return {
        "all": ops,
        "linear": replace(ops, linear=TORCH_OPS.linear),
        "dropout": replace(ops, dropout=TORCH_OPS.dropout, sample_zeros=TORCH_OPS.sample_zeros),
        "max_padded_group": replace(ops, max_padded_group=TORCH_OPS.max_padded_group),
        "max_scores_at_once": replace(ops, max_scores_at_once=TORCH_OPS.max_scores_at_once),
        "max_training_logits": replace(ops, max_training_logits=TORCH_OPS.max_training_logits),
        "max_read_logits": replace(ops, max_read_logits=TORCH_OPS.max_read_logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glm_large")
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--scoring", choices=("shared_context", "published"), default="shared_context")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="operations to leave out, with commas (default: each in turn)")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the configuration, such as model.num_layers=6")
    parser.add_argument("--file", type=Path, help="HDF5 file of the published layout (default: generated)")
    given = parser.parse_args()
    runtime = CPURuntime()
    keys = [f"model={given.model}", f"scoring={given.scoring}", "data=record", "lr=1e-5", *given.overrides]
    config: Any = validate_config(compose_config("train", keys), TrainConfig)
    split = open_dataset(given.file or corpus.cached(), False, None)
    indices = list(range(given.bs))
    batch = collate_padded(split, indices, 512) if given.scoring == "published" else collate_packed(split, indices)
    torch.manual_seed(0)
    glm = build_glm(config.model, runtime.model_ops())[0].train()
    optimizer = make_optimizer(glm, config.optimizer)
    every = variants(runtime.model_ops())
    if given.only:
        every = {name: every[name] for name in ("all", *given.only.split(","))}
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"bf16: {', '.join(bf16_instructions()) or 'no instructions'}; {given.model}, bs {given.bs}, {given.scoring}")
    print("| precision | without | gain | lowest, highest of the rounds |\n|---|---|---|---|")
    for precision in given.precisions.split(","):
        times: Dict[str, Any] = {name: [] for name in every}
        for number in range(given.rounds + 1):  # the first one is a warm-up
            for name, ops in every.items():
                use(glm, ops)
                start = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    loss = candidate_loss(candidate_scores(glm, batch, TRAIN_MASK))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if number:
                    times[name].append(time.perf_counter() - start)
        print(f"| {precision} | nothing: {statistics.median(times['all']):.2f} s a step | | |")
        for name in list(every)[1:]:
            gains = [without / full - 1.0 for without, full in zip(times[name], times["all"])]
            low, high = min(gains), max(gains)
            print(f"| {precision} | {name} | {statistics.median(gains):+.1%} | {low:+.1%}, {high:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
