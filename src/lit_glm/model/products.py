"""Attention as products and a softmax, forward and backward: where no fused kernel serves.

Shapes: N sequences, H heads, d = D / H.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.model.dropout import draw

_SCALES = not torch.__version__.startswith("1.")
"""Whether a product with beta=0 leaves out what stood there; torch 1.12 adds zero times that, which may be NaN."""
_SCORES = 2**21
"""Scores that a processor computes at a time (8 MiB in fp32)."""


class Products(torch.autograd.Function):
    """Attention as products and a softmax; keeps the probabilities before and after dropout.

    On a processor a few sequences at a time, so that their scores fit a cache. The backward pass takes a row's sum of
    gradient x probability from the output, which is shorter than the row (Dao et al. 2022, FlashAttention, appendix
    B.2), and overwrites what it no longer needs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forbidden: Optional[Tensor], dropout: float) -> Tensor:
        """[N, H, queries, d] of q [N, H, queries, d], k and v [N, H, keys, d]; `forbidden` is true where no key is."""
        N, H, queries, d = q.shape
        keys = k.shape[2]
        ctx.factor, ctx.scale = 1.0 / math.sqrt(d), 1.0
        ctx.sequences = max(1, _SCORES // (H * queries * keys)) if q.device.type == "cpu" else N
        q, k, v = (part.reshape(N * H, -1, d) for part in (q, k, v))
        out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for start in range(0, N, ctx.sequences):
            some = slice(start * H, (start + ctx.sequences) * H)
            scores = _product(q[some], k[some].transpose(1, 2), ctx.factor)
            if forbidden is not None:
                own = forbidden if len(forbidden) != N else forbidden[start : start + ctx.sequences]
                scores.view(-1, H, queries, keys).masked_fill_(own, torch.finfo(scores.dtype).min)
            probabilities = dropped = _softmax(scores)
            if dropout:
                keep, ctx.scale = draw(probabilities, dropout)
                dropped = keep.mul_(probabilities)
            _product(dropped, v[some], ctx.scale, out[some])
            kept += [probabilities, dropped]
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(N, H, queries, d)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        N, H, queries, d = grads[0].shape
        grad = grads[0].reshape(N * H, queries, d)
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        grad_q, grad_k, grad_v = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))
        for number in range(len(kept) // 2):
            some = slice(number * ctx.sequences * H, (number + 1) * ctx.sequences * H)
            probabilities, dropped = kept[2 * number : 2 * number + 2]
            _product(dropped.transpose(1, 2), grad[some], ctx.scale, grad_v[some])
            grad_scores = _product(grad[some], v[some].transpose(1, 2), ctx.scale)
            if dropped is probabilities:
                grad_scores.sub_(row_sum[some]).mul_(probabilities)
            else:  # (gradient x keep - row sum) x probability
                grad_scores.mul_(dropped).addcmul_(probabilities, row_sum[some], value=-1)
            _product(grad_scores, k[some], ctx.factor, grad_q[some])
            _product(grad_scores.transpose(1, 2), q[some], ctx.factor, grad_k[some])
        return (*(part.view(N, H, -1, d) for part in (grad_q, grad_k, grad_v)), None, None)


def _product(left: Tensor, right: Tensor, factor: float, out: Optional[Tensor] = None) -> Tensor:
    """Factor x left @ right, into a part of a result where one is given.

    On cards in steps: a runtime need not know products that scale, or write where they are told.
    """
    if left.device.type == "cpu" and _SCALES:
        out = left.new_empty(left.shape[0], left.shape[1], right.shape[2]) if out is None else out
        return torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)
    product = torch.bmm(left, right)
    product = product if factor == 1.0 else product.mul_(factor)
    return product if out is None else out.copy_(product)


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype is torch.float16 and scores.device.type == "cpu":  # torch 1.12 has none there
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return F.softmax(scores, dim=-1)  # sums in fp32, in halves too
