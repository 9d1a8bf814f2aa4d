"""How many operators and kernels a training step of GLM-Large calls, counted without an accelerator.

    python benchmarks/launches.py [--layers 24] [--groups 4]    # eager, by phase, on device "meta"
    python benchmarks/launches.py --compile                     # model.compile=true: kernels that Inductor generates
    python benchmarks/launches.py --waits                       # reads of tensors by the host per step of a real run

Counted are operators below autograd that compute (views do not), as CUDA dispatches them: dropout is one operator
(`native_dropout`), fused attention with a mask is one (`_scaled_dot_product_efficient_attention`); "composed" counts
what a device without either gets, where torch composes both from smaller operators. One operator for lists of tensors
("foreach") counts once, although a GPU needs a few launches for 293 tensors. Clipping by lists (as on CUDA) and the
fused update are counted on the CPU, since meta has neither. Reads by the host are an error on meta.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from lit_glm.compat import dispatch_mode
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import PackedBatch, build_padding_index
from lit_glm.hardware.precision import FP16Precision, make_precision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores
from lit_glm.training.optimizer import make_optimizer
from lit_glm.verification.operator_check import NON_COMPUTING_OPS, operator_name

PHASES = ("forward", "backward", "division by the scale", "clipping", "update", "rounding to fp16")


class Meta(Runtime):
    """A stand-in for a card: shapes and types, no content."""

    def device(self, index: int) -> torch.device:
        """Always the same."""
        return torch.device("meta")

    def autocast(self, dtype: torch.dtype) -> Any:
        """None of its own."""
        return torch.autocast("cpu", dtype=dtype)


class Count:
    """Operators by phase."""

    def __init__(self) -> None:
        self.phases: Dict[str, Counter] = {phase: Counter() for phase in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, operators are this phase's."""

        def count_call(operator: Any, args: Any, kwargs: Any) -> Any:
            base_name = operator_name(operator)
            if base_name not in ("t", "_unsafe_view") and not base_name.startswith(NON_COMPUTING_OPS):
                self.phases[name][base_name] += 1
            return operator(*args, **kwargs)

        with dispatch_mode(count_call):
            yield


def batch(groups: int, n: int = 230, m: int = 26) -> PackedBatch:
    tokens = torch.randint(5, 90, (groups * (n + m),))
    places = build_padding_index(np.full(groups, n), np.full(groups, m), np.arange(groups * m) // 13)
    return PackedBatch(
        tokens, tokens % 90, tokens % 3, tokens[-groups * m :], torch.arange(groups * m) // 13,
        torch.arange(2 * groups), [n] * groups, [m] * groups, places, groups, 2,
    )  # fmt: skip


@contextmanager
def dispatch_as_cuda() -> Iterator[None]:
    """Call what torch calls on CUDA (ATen/native/Dropout.cpp, transformers/attention.cpp) instead of its parts."""
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def fused(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0) -> Any:
        bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p)[0]

    F.dropout = lambda x, p=0.5, training=True, inplace=False: torch.native_dropout(x, p, True)[0]
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention


def step(precision: str, layers: int, groups: int, attention: str = "auto") -> Count:
    overrides = [f"precision={precision}", f"model.num_layers={layers}", "model.hidden_size=64"]
    overrides.append(f"model.attention={attention}")
    config = validate_config(
        compose_config("train", [*overrides, "model.num_attention_heads=4", "model.vocab_size=128"]), TrainConfig
    )
    runtime, count = Meta(), Count()
    plugin: Any = make_precision(config, runtime, check_on_device=False)
    glm = plugin.convert_module(build_glm(config.model, runtime.model_ops())[0]).to("meta").train()
    optimizer = make_optimizer(glm, config.optimizer)
    if isinstance(plugin, FP16Precision):
        plugin.wrap_optimizers([optimizer])
    with count.phase("forward"), plugin.forward_context():
        loss = candidate_loss(candidate_scores(glm, batch(groups).to("meta"), TRAIN_MASK))
    scaler = getattr(plugin, "scaler", None)
    with count.phase("backward"):
        (loss if scaler is None else scaler.scale(loss.float())).backward()
    if scaler is not None:
        with count.phase("division by the scale"):
            plugin.unscale_(optimizer)
    # By lists, as torch does it on CUDA by itself; meta has no lists, so as many small tensors on the processor.
    trained = [torch.nn.Parameter(torch.ones(1)) for group in optimizer.param_groups for _ in group["params"]]
    for parameter in trained:
        parameter.grad = torch.ones(1)
    with count.phase("clipping"):
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
    small = torch.nn.Linear(4, 4)
    small.weight.grad, small.bias.grad = torch.ones(4, 4), torch.ones(4)
    fused = torch.optim.AdamW([{"params": [small.weight]}, {"params": [small.bias]}], fused=True)
    fused.step()  # makes its state
    with count.phase("update"):
        fused.step()
    if isinstance(plugin, FP16Precision):
        with count.phase("rounding to fp16"):
            plugin.round_weights()
    return count


def generated(layers: int, groups: int) -> "tuple[int, int, int]":
    """Count generated kernels that a step of `layers` layers calls, compiled graphs, and Inductor's own count.

    For the CPU Inductor counts each variant of a loop (vectorised, remainder) as a kernel.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    model = ["model=glm_large", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4"]
    overrides = [*model, "model.vocab_size=128", "model.compile=true"]
    glm = build_glm(validate_config(compose_config("train", overrides), TrainConfig).model)[0].train()

    def steps() -> None:
        for n in (230, 200):  # another length compiles nothing
            candidate_loss(candidate_scores(glm, batch(groups, n), TRAIN_MASK)).backward()

    _, codes = run_and_get_code(steps)
    called = sum(code.count("= async_compile.") for code in codes)
    return called * layers, counters["stats"]["unique_graphs"], metrics.generated_kernel_count


_READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__")


def reads(precision: str, steps: int = 6) -> Counter:
    """How often the host reads a tensor in the steps of a run, by where: on a card each is a wait."""
    from lit_glm import train
    from lit_glm.metrics.benchmark_callback import BenchmarkCallback
    from lit_glm.training.module import RecordModule

    counts: Counter = Counter()
    location = [""]

    def counted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[location[0]] += 1
            return real(self, *args, **kwargs)

        return read

    def inside(kind: Any, name: str, label: str) -> None:
        real = getattr(kind, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            location[0] = label
            try:
                return real(*args, **kwargs)
            finally:
                location[0] = ""

        setattr(kind, name, called)

    for name in _READS:
        setattr(torch.Tensor, name, counted(name))
    inside(RecordModule, "training_step", "in the step")
    inside(BenchmarkCallback, "on_train_batch_end", "behind it")
    with tempfile.TemporaryDirectory() as folder:
        limits = [f"run.max_steps={steps}", "run.eval_interval_samples=100000000", "run.eval_start_samples=100000000"]
        overrides = [f"precision={precision}", f"hydra.run.dir={folder}/run", "run.checkpoint_interval_steps=1000"]
        sys.argv = ["train", "experiment=debug", *limits, *overrides]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main()
    return Counter({label: counts[label] / steps for label in ("in the step", "behind it")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--precision", default="fp32,bf16,amp,fp16")
    parser.add_argument("--compile", action="store_true", help="kernels that Inductor generates")
    parser.add_argument("--names", action="store_true", help="the operators of each phase too")
    given = parser.parse_args()
    if given.waits:  # the last step's evaluation is behind it
        for precision in given.precision.split(","):
            waits = reads(precision)
            print(precision, {label: round(value, 2) for label, value in waits.items()}, flush=True)
        return
    if given.compile:
        kernels, graphs, variants = generated(given.layers, given.groups)
        print(f"{kernels} generated kernels per step of {given.layers} layers, {graphs} graph(s)")
        print(f"metrics.generated_kernel_count: {variants}, loop variants of one layer's kernels")
        return
    print("| precision | attention | " + " | ".join(PHASES) + " | in all |\n" + "|---" * (len(PHASES) + 3) + "|")
    for precision in given.precision.split(","):
        for attention in ("auto", "matmul", "composed"):
            with contextlib.nullcontext() if attention == "composed" else dispatch_as_cuda():
                count = step(precision, given.layers, given.groups, "auto" if attention == "composed" else attention)
            sums = [sum(count.phases[phase].values()) for phase in PHASES]
            print(f"| {precision} | {attention} | " + " | ".join(map(str, [*sums, sum(sums)])) + " |", flush=True)
            if given.names:
                for phase in PHASES:
                    print(f"  {phase}: {dict(count.phases[phase].most_common(12))}")


if __name__ == "__main__":
    main()
