"""Estimate of the device memory that a training step needs, made before the run.

Weights, gradients and optimizer state are exact. Activations are the tensors that autograd saves in the layers of
`lit_glm.model.glm` for the largest batch of the data, in rows of D numbers; a test compares them with the kernel's own
count. Memory that libraries allocate for themselves is not known beforehand and not included.
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
_SAVED_ROWS = 17.0
"""Rows of D numbers that a layer saves for its backward pass: inputs and outputs of the norms 4, Q K V 3, attention
output and residual 2, MLP 4 before and 4 after the activation."""
_SAVED_ROWS_LAST_LAYER = 4.0
"""Rows saved for the contexts in the last layer (`shared_context`): input and output of the norm, K, V."""
_COPIED_KV_ROWS = 2.0
"""On CPU: second copy of a context's keys and values, concatenated with those of its candidates."""
_SAVED_PADDED_ROWS = 4.0
"""Rows that attention saves in groups of equal size, on other devices than CPUs: Q K V 3, output 1."""
_HEAD_COPIES = 1.0
"""Logits; the backward pass overwrites them with their gradient."""


@dataclass
class MemoryEstimate:
    """Estimated bytes per device."""

    weights: float
    training: float
    """Gradients, optimizer state, master weights."""
    activations: float
    base: float
    """Bytes in use before the model is created."""

    @property
    def total(self) -> float:
        """Total bytes."""
        return self.weights + self.training + self.activations + self.base


def count_parameters(model: ModelConfig) -> int:
    """Count the parameters of a GLM (335 M for glm_large)."""
    D = model.hidden_size
    tables = (model.vocab_size + 2 * (model.max_sequence_length + 1)) * D
    return tables + model.num_layers * (12 * D * D + 13 * D) + 2 * D


def estimate_memory(
    config: TrainConfig, lengths: SequenceLengths, base: float, saves_attention_probs: bool, bs: Optional[int] = None
) -> MemoryEstimate:
    """Estimate the peak memory of a training step.

    Args:
        config: run configuration.
        lengths: lengths of the training examples; the largest batch determines the estimate.
        base: bytes already in use.
        saves_attention_probs: whether attention saves its probabilities (matmul does, fused kernels do not).
        bs: batch size to use instead of the configured one.
    """
    count = float(count_parameters(config.model))
    half = config.precision.name == "fp16"
    weights = count * (2 if half else 4)
    training = count * (2 + 4 + 4 + 8 if half else 4 + 8)
    return MemoryEstimate(
        weights, training, _activation_bytes(config, lengths, bs or config.bs, saves_attention_probs), base
    )


def _activation_bytes(config: TrainConfig, lengths: SequenceLengths, bs: int, saves_attention_probs: bool) -> float:
    model = config.model
    D, L, V = model.hidden_size, model.num_layers, model.vocab_size
    size = 2.0 if config.precision.name == "fp16" else 3.0 if config.precision.name in ("amp", "bf16") else 4.0
    is_cpu = config.hardware.accelerator == "cpu"
    dropout = 2.0 * D * _dropout_bytes(model.hidden_dropout, is_cpu)
    if config.scoring.name == "published":
        rows = float(min(bs, len(lengths)) * lengths.candidates.max() * config.data.max_seq_length)
        predicting = rows
        pairs = rows * config.data.max_seq_length
    else:
        rows = _sum_of_largest(lengths.rows, bs)
        predicting = _sum_of_largest(lengths.predicting, bs)
        pairs = _sum_of_largest(lengths.pairs, bs)
    shared = config.scoring.name != "published"
    again = _COPIED_KV_ROWS if is_cpu and shared else 0.0
    layer = rows * ((_SAVED_ROWS + again) * D * size + dropout)
    if shared and not is_cpu:  # groups are padded to equal size for attention, (n + m)^2 <= 4/3 of their pairs
        count = min(bs, len(lengths))
        layer += (count * float(lengths.rows.max()) - rows) * _SAVED_PADDED_ROWS * D * size
        pairs = 4.0 / 3.0 * count * float(lengths.pairs.max())
    if saves_attention_probs:
        layer += pairs * model.num_attention_heads * (size + _dropout_bytes(model.attention_dropout, is_cpu))
    last = (
        (rows * (_SAVED_ROWS_LAST_LAYER + again) + predicting * (_SAVED_ROWS - _SAVED_ROWS_LAST_LAYER)) * D * size
        if shared
        else layer
    )
    kept = L * rows * D * size + layer if model.activation_checkpointing else (L - 1) * layer + last
    return kept + predicting * V * 4.0 * _HEAD_COPIES


def _dropout_bytes(p: float, is_cpu: bool) -> float:
    """Return the bytes per element that dropout saves: positions of the zeros on CPU, a byte mask elsewhere."""
    return 8.0 * p if is_cpu else float(p > 0)


def _sum_of_largest(lengths: Any, bs: int) -> float:
    """Return the sum of the `bs` largest lengths, which no batch exceeds."""
    return float(np.sort(lengths)[-bs:].sum())


def largest_fitting_bs(
    config: TrainConfig, lengths: SequenceLengths, base: float, saves_attention_probs: bool, memory: float
) -> int:
    """Return the largest bs whose estimate fits into `memory` bytes; 0 if none does."""

    def fits(bs: int) -> bool:
        return bs <= len(lengths) and estimate_memory(config, lengths, base, saves_attention_probs, bs).total <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class MemoryCheck:
    """Memory estimate compared with the available memory."""

    estimate: MemoryEstimate
    available_bytes: Optional[float]
    """Bytes available to one device; None: unknown."""
    largest_bs: int
    """Largest bs that is estimated to fit; 0: none."""
    host_message: str = ""
    """Dry run only: message if this machine lacks the memory for all ranks."""


def check_memory(
    config: TrainConfig,
    lengths: SequenceLengths,
    runtime: Optional[Runtime],
    index: int = 0,
    base: Optional[float] = None,
) -> MemoryCheck:
    """Estimate the memory of a run and compare it with its device.

    Args:
        config: run configuration.
        lengths: lengths of the training examples.
        runtime: queried for total and used memory of the device, the total else from the hardware file; None: unknown.
        index: index of the device.
        base: bytes in use before the model was created; None: bytes in use now.
    """
    available_bytes, saves_attention_probs, host = None, True, ""
    ranks = config.topology.devices_per_node
    if runtime is not None:
        total, device = runtime.total_memory(index), runtime.device(index)
        if total is None and config.hardware.memory_gib is not None:
            total = config.hardware.memory_gib * _GIB
        sharing = ranks if runtime.shares_memory else 1
        available_bytes = None if total is None else total / sharing
        base = runtime.memory_in_use(index) if base is None else base
        saves_attention_probs = (
            choose_implementation(config.model.attention, device, config.model.attention_dropout) == "matmul"
        )
    base = base or 0.0
    estimate = estimate_memory(config, lengths, base, saves_attention_probs)
    if runtime is not None and runtime.simulated:
        host_bytes = psutil.virtual_memory().total
        if ranks * estimate.total > host_bytes:
            host = (
                f"dry run: {ranks} ranks need about {ranks * estimate.total / _GIB:.1f} GiB, this machine has "
                f"{host_bytes / _GIB:.1f} GiB; use model=glm_tiny or fewer devices"
            )
    fitting = 0
    if available_bytes is not None:
        fitting = largest_fitting_bs(config, lengths, base, saves_attention_probs, available_bytes)
    return MemoryCheck(estimate, available_bytes, fitting, host)


def memory_message(config: TrainConfig, check: MemoryCheck) -> str:
    """Describe the estimate in one line, in further ones what exceeds the device."""
    estimate, of = check.estimate, "" if check.available_bytes is None else f" of {check.available_bytes / _GIB:.1f}"
    digits = 1 if estimate.total >= 10 * _GIB else 2
    shown = [round(part / _GIB, digits) for part in (estimate.weights, estimate.training, estimate.activations)]
    rest = round(estimate.total / _GIB, digits) - sum(shown)  # so that the rounded parts add up
    parts = [f"{part:.{digits}f}" for part in (*shown, max(0.0, rest))]
    text = (
        f"memory: about {estimate.total / _GIB:.{digits}f}{of} GiB per device: weights {parts[0]}, gradients and "
        f"optimizer {parts[1]}, activations of the largest batch {parts[2]}, already in use {parts[3]}"
    )
    if check.host_message:
        text += f"\nmemory: {check.host_message}"
    if check.available_bytes is None or estimate.total <= check.available_bytes:
        return text
    largest = f"largest fitting bs: {check.largest_bs}"
    advice = largest if check.largest_bs else "no bs fits; use a smaller model or a device with more memory"
    return f"{text}\nmemory: bs={config.bs} is estimated to exceed device memory; {advice}"


def oom_message(config: TrainConfig, check: MemoryCheck, runtime: Runtime, index: int, doing: str) -> str:
    """Format the out-of-memory message; `doing` is the current activity, such as `in step 3`."""
    peak, total = runtime.peak_memory(index), runtime.total_memory(index)

    def gib(value: Optional[float]) -> str:
        return "unknown" if value is None else f"{value / _GIB:.1f} GiB"

    size = f"eval_bs={config.eval_bs}" if "evaluation" in doing else f"bs={config.bs}"
    largest = "unknown" if check.available_bytes is None else str(check.largest_bs)
    text = (
        f"out of memory {doing} ({size}): estimated {gib(check.estimate.total)} per device in training, peak "
        f"{gib(peak)}, available {gib(total)}; largest bs estimated to fit: {largest}"
    )
    if check.available_bytes is not None and check.largest_bs >= config.bs:
        text += ", so other processes use memory or the estimate is too low"
    return f"{text}; use a smaller {size.partition('=')[0]}, or model.activation_checkpointing=true"
