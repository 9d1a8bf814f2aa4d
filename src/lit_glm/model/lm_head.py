"""Log-probabilities of target tokens over a whole vocabulary, with a single table of logits.

torch's log-softmax saves a second [T, V] table for the backward pass and fills two more there; with one row per
position, as published, each takes gigabytes. Here the table is read in blocks, and the backward pass overwrites it with
its gradient. Shapes: T rows, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import autocast_dtype
from lit_glm.model.runtime_ops import TORCH_OPS, RuntimeOps

_BLOCK = 2**26
"""Logits that are computed at a time if no gradient needs them."""


def log_probabilities(h: Tensor, embeddings: Tensor, targets: Tensor, ops: RuntimeOps = TORCH_OPS) -> Tensor:
    """Compute the log-probabilities of target tokens, with a head that is tied to the word embeddings.

    Args:
        h: [T, D] hidden states.
        embeddings: [V, D] word embeddings.
        targets: [T] target tokens.
        ops: operations of the runtime.

    Returns:
        [T] float32. Its backward pass can run only once, because it overwrites the logits.
    """
    # In several parts, the gradient of the embeddings would be accumulated in half precision.
    is_half = h.dtype is not torch.float32 or autocast_dtype(h.device.type) is not None
    block = _BLOCK if not torch.is_grad_enabled() else 2**62 if is_half else ops.max_training_logits
    rows = max(1, block // len(embeddings))
    parts = [
        _TargetLogProb.apply(ops.linear(part, embeddings, None), target, ops.max_read_logits)
        for part, target in zip(h.split(rows), targets.split(rows))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _TargetLogProb(torch.autograd.Function):
    """Log-softmax of each row at its target, in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, block: int) -> Tensor:
        ctx.rows = max(1, block // logits.shape[1])
        picked = torch.empty(len(logits), 1, device=logits.device)
        for start in range(0, len(logits), ctx.rows):
            rows = slice(start, start + ctx.rows)
            log_softmax = F.log_softmax(logits[rows], dim=1, dtype=torch.float32)
            picked[rows] = log_softmax.gather(1, targets[rows, None])
        ctx.save_for_backward(logits, targets)
        return picked[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, targets = ctx.saved_tensors
        grad = grads[0][:, None]
        for start in range(0, len(logits), ctx.rows):
            rows = slice(start, start + ctx.rows)
            # d log p[t] / d logit[v] = (v == t) - p[v]
            grad_logits = F.softmax(logits[rows], dim=1, dtype=torch.float32).mul_(-grad[rows])
            logits[rows] = grad_logits.scatter_add_(1, targets[rows, None], grad[rows])
        return logits, None, None
