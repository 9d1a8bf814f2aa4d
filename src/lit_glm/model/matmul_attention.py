"""Attention as products and a softmax, forward and backward: where no fused kernel serves.

Shapes: N sequences, H heads, d = D / H.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.model.dropout import sample_zeros, zero_elements_

_SCORES = 2**21
"""Scores that a processor computes at a time (8 MiB in fp32)."""


class MatmulAttention(torch.autograd.Function):
    """Attention as products and a softmax; keeps the probabilities and where dropout put zeros.

    On a processor a few sequences at a time, so that their scores fit a cache. The backward pass takes a row's sum of
    gradient x probability from the output, which is shorter than the row (Dao et al. 2022, FlashAttention, appendix
    B.2), and overwrites what it no longer needs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forbidden: Optional[Tensor], dropout: float) -> Tensor:
        """[N, H, queries, d] of q [N, H, queries, d], k and v [N, H, keys, d]; `forbidden` is true where no key is."""
        N, H, queries, d = q.shape
        keys = k.shape[2]
        ctx.factor, ctx.scale, ctx.dropout = 1.0 / math.sqrt(d), 1.0, dropout
        ctx.sequences = max(1, _SCORES // (H * queries * keys)) if q.device.type == "cpu" else N
        q, k, v = (part.reshape(N * H, -1, d) for part in (q, k, v))
        out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for start in range(0, N, ctx.sequences):
            some = slice(start * H, (start + ctx.sequences) * H)
            scores = torch.bmm(q[some] * ctx.factor, k[some].transpose(1, 2))
            if forbidden is not None:
                own = forbidden if len(forbidden) != N else forbidden[start : start + ctx.sequences]
                scores.view(-1, H, queries, keys).masked_fill_(own, torch.finfo(scores.dtype).min)
            probabilities = _softmax(scores)
            kept.append(probabilities)
            if dropout:
                zeros, ctx.scale = sample_zeros(probabilities, dropout)
                kept.append(zeros)
                probabilities = zero_elements_(probabilities.clone(), zeros)
            _matmul_into(probabilities, v[some], out[some])
        if dropout:
            out.mul_(ctx.scale)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(N, H, queries, d)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        N, H, queries, d = grads[0].shape
        grad = grads[0].reshape(N * H, queries, d)
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        if ctx.scale != 1.0:
            grad = grad * ctx.scale
        grad_q, grad_k, grad_v = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))
        each = 2 if ctx.dropout else 1
        for number, start in enumerate(range(0, N, ctx.sequences)):
            some = slice(start * H, (start + ctx.sequences) * H)
            grad_scores = torch.bmm(grad[some], v[some].transpose(1, 2))
            probabilities, *zeros = kept[number * each : (number + 1) * each]
            dropped = zero_elements_(probabilities.clone(), *zeros) if zeros else probabilities
            _matmul_into(dropped.transpose(1, 2), grad[some], grad_v[some])
            if zeros:
                zero_elements_(grad_scores, *zeros)
            grad_scores.sub_(row_sum[some]).mul_(probabilities)
            _matmul_into(grad_scores, k[some], grad_q[some])
            _matmul_into(grad_scores.transpose(1, 2), q[some], grad_k[some])
        grad_q.mul_(ctx.factor)
        grad_k.mul_(ctx.factor)
        return (*(part.view(N, H, -1, d) for part in (grad_q, grad_k, grad_v)), None, None)


def _matmul_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Into a part of a result. On cards by a copy: a runtime need not know products that write where they are told."""
    if out.device.type == "cpu":
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype is torch.float16 and scores.device.type == "cpu":  # torch 1.12 has none there
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return F.softmax(scores, dim=-1)  # sums in fp32, in halves too
