"""How much device memory a training step will take, said before it is taken.

Counted: weights, gradients and optimizer state exactly; activations as the tensors that autograd keeps for the largest
batch of the data, in rows of D numbers, as the layers of `lit_glm.model.glm` keep them (and as measured: the test
compares with the kernel's own count). What a library allocates for itself is not known beforehand.
"""

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import psutil

from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.data.memmap_dataset import SequenceLengths
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.attention import choose_implementation

_GIB = 2**30
_KEPT = 17.0
"""Rows of D numbers that a layer keeps for its backward pass: norms' inputs and outputs 4, Q K V 3, attention's output
and residual 2, MLP 4 before and 4 behind the activation."""
_KEPT_LAST = 4.0
"""Of the last layer's contexts, which leave it in no row: norm's input and output, K, V (`shared_context`)."""
_KEYS_AGAIN = 2.0
"""Of processors: a context's keys and values stand a second time, beside those of its candidates."""
_HEAD_COPIES = 1.0
"""Logits; the backward pass turns them into their own gradient."""


@dataclass
class MemoryEstimate:
    """Bytes a device."""

    weights: float
    training: float
    """Gradients, optimizer state, master weights."""
    activations: float
    base: float
    """In use before the model is made."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.training + self.activations + self.base


def count_parameters(model: ModelConfig) -> int:
    """Parameters of a GLM of this shape (335 M for glm_large)."""
    D = model.hidden_size
    tables = (model.vocab_size + 2 * (model.max_sequence_length + 1)) * D
    return tables + model.num_layers * (12 * D * D + 13 * D) + 2 * D


def estimate_memory(
    config: TrainConfig, lengths: SequenceLengths, base: float, keeps_scores: bool, bs: Optional[int] = None
) -> MemoryEstimate:
    """Estimate the peak of a training step.

    Args:
        config: the run's.
        lengths: of the training examples: the largest batch counts.
        base: bytes in use already.
        keeps_scores: whether attention keeps its probabilities for the backward pass (products do, fused kernels not).
        bs: another batch size than the configuration's.
    """
    count = float(count_parameters(config.model))
    half = config.precision.name == "fp16"
    weights = count * (2 if half else 4)
    training = count * (2 + 4 + 4 + 8 if half else 4 + 8)
    return MemoryEstimate(weights, training, _activation_bytes(config, lengths, bs or config.bs, keeps_scores), base)


def _activation_bytes(config: TrainConfig, lengths: SequenceLengths, bs: int, keeps_scores: bool) -> float:
    model = config.model
    D, L, V = model.hidden_size, model.num_layers, model.vocab_size
    size = 2.0 if config.precision.name == "fp16" else 3.0 if config.precision.name in ("amp", "bf16") else 4.0
    on_processor = config.hardware.accelerator == "cpu"
    dropout = 2.0 * D * _dropout_bytes(model.hidden_dropout, on_processor)
    if config.scoring.name == "published":
        rows = float(min(bs, len(lengths)) * lengths.candidates.max() * config.data.max_seq_length)
        predicting = rows
        pairs = rows * config.data.max_seq_length
    else:
        rows = _sum_of_largest(lengths.rows, bs)
        predicting = _sum_of_largest(lengths.predicting, bs)
        pairs = _sum_of_largest(lengths.pairs, bs)
    shared = config.scoring.name != "published"
    again = _KEYS_AGAIN if on_processor and shared else 0.0
    layer = rows * ((_KEPT + again) * D * size + dropout)
    if keeps_scores:
        layer += pairs * model.num_attention_heads * (size + _dropout_bytes(model.attention_dropout, on_processor))
    last = (rows * (_KEPT_LAST + again) + predicting * (_KEPT - _KEPT_LAST)) * D * size if shared else layer
    kept = L * rows * D * size + layer if model.activation_checkpointing else (L - 1) * layer + last
    return kept + predicting * V * 4.0 * _HEAD_COPIES


def _dropout_bytes(p: float, on_processor: bool) -> float:
    """Bytes an element that dropout keeps: on a processor the places of the zeros, elsewhere a mask of bytes."""
    return 8.0 * p if on_processor else float(p > 0)


def _sum_of_largest(lengths: Any, bs: int) -> float:
    """Sum of the longest `bs`: no batch has more."""
    lengths = np.asarray(lengths)
    bs = min(bs, len(lengths))
    return float(np.partition(lengths, len(lengths) - bs)[len(lengths) - bs :].sum())


def largest_fitting_bs(
    config: TrainConfig, lengths: SequenceLengths, base: float, keeps_scores: bool, memory: float
) -> int:
    """The largest bs whose estimate fits into `memory` bytes; 0 if none does."""

    def fits(bs: int) -> bool:
        return bs <= len(lengths) and estimate_memory(config, lengths, base, keeps_scores, bs).total <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class MemoryCheck:
    """An estimate against what there is."""

    estimate: MemoryEstimate
    available_bytes: Optional[float]
    """Bytes that a device has for itself; None: unknown."""
    largest_bs: int
    """The largest bs that is estimated to fit; 0: none."""
    host_message: str = ""
    """Of a rehearsal: what the machine itself lacks, that holds all of its ranks."""

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return (self.available_bytes is None or self.estimate.total <= self.available_bytes) and not self.host_message


def check_memory(
    config: TrainConfig,
    lengths: SequenceLengths,
    runtime: Optional[Runtime],
    index: int = 0,
    base: Optional[float] = None,
) -> MemoryCheck:
    """Estimate a run and compare with its device.

    Args:
        config: the run's.
        lengths: of the training examples.
        runtime: asked for the device's memory, in all and in use; None: unknown.
        index: of the device.
        base: bytes in use before the model was made; None: what is in use now.
    """
    own, keeps_scores, host = None, True, ""
    ranks = config.topology.devices_per_node
    if runtime is not None:
        total, device = runtime.total_memory(index), runtime.device(index)
        sharing = ranks if runtime.shares_memory else 1
        own = None if total is None else total / sharing
        base = runtime.memory_in_use(index) if base is None else base
        keeps_scores = choose_implementation(config.model.attention, device, config.model.attention_dropout) == "matmul"
    base = base or 0.0
    guess = estimate_memory(config, lengths, base, keeps_scores)
    if runtime is not None and runtime.simulated:
        there = psutil.virtual_memory().total
        if ranks * guess.total > there:
            host = (
                f"a rehearsal runs on this machine: {ranks} ranks take about {ranks * guess.total / _GIB:.1f} GiB, it "
                f"has {there / _GIB:.1f}; rehearse with model=glm_tiny, or fewer devices"
            )
    fitting = 0 if own is None else largest_fitting_bs(config, lengths, base, keeps_scores, own)
    return MemoryCheck(guess, own, fitting, host)


def memory_message(
    config: TrainConfig,
    lengths: SequenceLengths,
    runtime: Optional[Runtime],
    index: int = 0,
    base: Optional[float] = None,
) -> str:
    """Describe the estimate in one line, in further ones what exceeds the device; arguments as for `check_memory`."""
    found = check_memory(config, lengths, runtime, index, base)
    guess, of = found.estimate, "" if found.available_bytes is None else f" of {found.available_bytes / _GIB:.1f}"
    digits = 1 if guess.total >= 10 * _GIB else 2
    shown = [round(part / _GIB, digits) for part in (guess.weights, guess.training, guess.activations)]
    rest = round(guess.total / _GIB, digits) - sum(shown)  # so that what is read adds up
    parts = [f"{part:.{digits}f}" for part in (*shown, max(0.0, rest))]
    text = (
        f"memory: about {guess.total / _GIB:.{digits}f}{of} GiB a device: weights {parts[0]}, gradients and "
        f"optimizer {parts[1]}, activations of the largest batch {parts[2]}, in use already {parts[3]}"
    )
    if found.host_message:
        text += f"\nmemory: {found.host_message}"
    if found.available_bytes is None or guess.total <= found.available_bytes:
        return text
    largest = f"the largest bs that fits is {found.largest_bs}"
    advice = largest if found.largest_bs else "no bs fits: take a smaller model or more memory"
    return f"{text}\nmemory: bs={config.bs} is estimated above what the device has; {advice}"


def oom_message(
    config: TrainConfig, lengths: SequenceLengths, runtime: Runtime, index: int, base: Optional[float], doing: str
) -> str:
    """What is said when there was not enough.

    Args:
        config: the run's.
        lengths: of the training examples.
        runtime: of the device.
        index: of the device.
        base: bytes in use before the model was made.
        doing: where the run was, such as `in step 3`.
    """
    found = check_memory(config, lengths, runtime, index, base)
    peak, total = runtime.peak_memory(index), runtime.total_memory(index)

    def gib(value: Optional[float]) -> str:
        return "unknown" if value is None else f"{value / _GIB:.1f} GiB"

    size = f"eval_bs={config.eval_bs}" if "evaluation" in doing else f"bs={config.bs}"
    largest = "unknown" if found.available_bytes is None else str(found.largest_bs)
    text = (
        f"out of memory {doing} ({size}): estimated {gib(found.estimate.total)} per device in training, peak "
        f"{gib(peak)}, available {gib(total)}; the largest bs estimated to fit is {largest}"
    )
    if found.available_bytes is not None and found.largest_bs >= config.bs:
        text += ", so something else takes memory, or the estimate is too low"
    return f"{text}; take a smaller {size.partition('=')[0]}, or model.activation_checkpointing=true"
