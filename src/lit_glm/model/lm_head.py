"""Log-probabilities of target tokens over a whole vocabulary, with a single table of logits.

torch's log-softmax saves a second [T, V] table for the backward pass and fills two more there; with one row per
position, as published, each takes gigabytes. Here the table is read in slices (on CPU, of a size that fits the cache),
and the backward pass overwrites it with its gradient. Shapes: T rows, D hidden, V vocabulary.
"""

from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.model.runtime_ops import is_cpu_autocast_enabled

_CPU_SLICE = 2**20
"""Elements of a table that are processed at a time on CPU (4 MiB in fp32)."""
_LOGITS_PER_MATMUL = 2**25
"""Logits computed at a time on CPU (128 MiB): enough rows for a product at full speed. In one piece the table of
`published` takes gigabytes, which the C library returns after each step and the kernel clears again before the next."""
_DEVICE_SLICE = 2**26
"""Elements that other devices read at a time, and compute at a time if no gradient needs them."""


def log_probabilities(
    h: Tensor, embeddings: Tensor, targets: Tensor, linear: Callable[..., Tensor] = F.linear
) -> Tensor:
    """Compute the log-probabilities of target tokens, with a head that is tied to the word embeddings.

    Args:
        h: [T, D] hidden states.
        embeddings: [V, D] word embeddings.
        targets: [T] target tokens.
        linear: function for the product.

    Returns:
        [T] float32. Its backward pass can run only once, because it overwrites the logits.
    """
    # In several parts, the gradient of the embeddings would be accumulated in half precision.
    whole = torch.is_grad_enabled() and (
        h.device.type != "cpu" or is_cpu_autocast_enabled() or h.dtype is not torch.float32
    )
    rows = len(h) if whole else _rows_per_slice(h, len(embeddings), _LOGITS_PER_MATMUL)
    parts = [
        _target_log_probs(linear(part, embeddings, None), target)
        for part, target in zip(h.split(rows), targets.split(rows))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.numel() <= _CPU_SLICE:
        return -F.cross_entropy(logits.float(), targets, reduction="none")
    picked: Tensor = _TargetLogProb.apply(logits, targets)
    return picked


class _TargetLogProb(torch.autograd.Function):
    """Log-softmax of each row at its target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        picked = torch.empty(len(logits), 1, device=logits.device)
        for rows in _row_slices(logits, logits.shape[1], _CPU_SLICE):
            log_softmax = F.log_softmax(logits[rows], dim=1, dtype=torch.float32)
            picked[rows] = log_softmax.gather(1, targets[rows, None])
        ctx.save_for_backward(logits, targets)
        return picked[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, targets = ctx.saved_tensors
        grad = grads[0][:, None]
        for rows in _row_slices(logits, logits.shape[1], _CPU_SLICE):
            # d log p[t] / d logit[v] = (v == t) - p[v]
            own = F.softmax(logits[rows], dim=1, dtype=torch.float32).mul_(-grad[rows])
            logits[rows] = own.scatter_add_(1, targets[rows, None], grad[rows])
        return logits, None


def _row_slices(table: Tensor, width: int, elements: int) -> Iterator[slice]:
    """Yield slices of rows with at most `elements` elements, at `width` elements per row."""
    rows = _rows_per_slice(table, width, elements)
    for start in range(0, len(table), rows):
        yield slice(start, start + rows)


def _rows_per_slice(table: Tensor, width: int, elements: int) -> int:
    return max(1, (elements if table.device.type == "cpu" else _DEVICE_SLICE) // width)
