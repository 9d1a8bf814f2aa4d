"""Attention as products and a softmax, forward and backward: where no fused kernel serves.

Shapes: N sequences, H heads, d = D / H.
"""

import math
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.model.dropout import sample_zeros, with_zeros, zero_elements_

_SCORES = 2**21
"""Scores that a processor computes at a time (8 MiB in fp32)."""


class MatmulAttention(torch.autograd.Function):
    """Attention as products and a softmax; keeps the probabilities and the zeros that dropout has drawn.

    On the CPU a few sequences at a time, so that their scores fit a cache. The backward pass takes a row's sum of
    gradient x probability from the output, which is shorter than the row (Dao et al. 2022, FlashAttention, appendix
    B.2), and overwrites what it no longer needs. Factors are part of a product (`alpha`), which saves a kernel each.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forbidden: Optional[Tensor], dropout: float) -> Tensor:
        """[N, H, queries, d] of q [N, H, queries, d], k and v [N, H, keys, d]; `forbidden` is true at hidden keys."""
        N, H, queries, d = q.shape
        keys = k.shape[2]
        ctx.factor, ctx.scale, ctx.dropout = 1.0 / math.sqrt(d), 1.0, dropout
        ctx.sequences = max(1, _SCORES // (H * queries * keys)) if q.device.type == "cpu" else N
        q, k, v = (part.reshape(N * H, -1, d) for part in (q, k, v))
        parts, kept = [], []
        for start in range(0, N, ctx.sequences):
            some = slice(start * H, (start + ctx.sequences) * H)
            scores = _scaled_product(q[some], k[some].transpose(1, 2), ctx.factor)
            if forbidden is not None:
                own = forbidden if len(forbidden) != N else forbidden[start : start + ctx.sequences]
                scores.view(-1, H, queries, keys).masked_fill_(own, torch.finfo(scores.dtype).min)
            probabilities = _softmax(scores)
            kept.append(probabilities)
            if dropout:
                zeros, ctx.scale = sample_zeros(probabilities, dropout)
                kept.append(zeros)
                probabilities = with_zeros(probabilities, zeros)
            parts.append(_scaled_product(probabilities, v[some], ctx.scale))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(N, H, queries, d)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        N, H, queries, d = grads[0].shape
        grad = grads[0].reshape(N * H, queries, d)
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        each = 2 if ctx.dropout else 1
        parts: List[List[Tensor]] = [[], [], []]
        for number, start in enumerate(range(0, N, ctx.sequences)):
            some = slice(start * H, (start + ctx.sequences) * H)
            probabilities, *zeros = kept[number * each : (number + 1) * each]
            grad_scores = _scaled_product(grad[some], v[some].transpose(1, 2), ctx.scale)
            dropped = probabilities
            if zeros:
                zero_elements_(grad_scores, *zeros)
                dropped = with_zeros(probabilities, *zeros)
            parts[2].append(_scaled_product(dropped.transpose(1, 2), grad[some], ctx.scale))
            grad_scores.sub_(row_sum[some]).mul_(probabilities)
            parts[0].append(_scaled_product(grad_scores, k[some], ctx.factor))
            parts[1].append(_scaled_product(grad_scores.transpose(1, 2), q[some], ctx.factor))
        joined = (own[0] if len(own) == 1 else torch.cat(own) for own in parts)
        return (*(own.view(N, H, -1, d) for own in joined), None, None)


def _scaled_product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`factor` x left @ right, [N, rows, cols] each, in one kernel."""
    if factor == 1.0:
        return torch.bmm(left, right)
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(left.new_empty(shape), left, right, beta=0.0, alpha=factor)


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype is torch.float16 and scores.device.type == "cpu":  # torch 1.12 has none there
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    # Sums in fp32, in halves too. Without the type, autocast on some devices would return and keep fp32.
    return F.softmax(scores, dim=-1, dtype=scores.dtype)
