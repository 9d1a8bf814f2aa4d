"""Dropout whose masks cost little on the processor.

torch's own dropout draws one number after the other there, 32 bits each, and multiplies a half with a boolean by way of
two copies: a fifth of a training step of GLM-Large in bf16. Here 64 random bits of numpy's SFC64 (Doty-Humphrey,
https://pracrand.sourceforge.net) give four masks, in the type that they are multiplied in. Everywhere else torch's
kernel is taken.
"""

from typing import Any, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOWEST_64 = -(2**63)
_STEPS = 2**16
_FEW = 2**12  # 64-bit words up to which a generator of their own costs more than it saves


def draw(like: Tensor, p: float) -> Tuple[Tensor, float]:
    """A mask of dropout.

    Args:
        like: gives shape, type and device.
        p: share of zeros; on the processor rounded to 1 / 65536.

    Returns:
        1 where an element stays, 0 elsewhere; and what to multiply it with so that the mean stays.
    """
    if like.device.type != "cpu":
        return (torch.rand(like.shape, device=like.device) >= p).to(like.dtype), 1.0 / (1.0 - p)
    dropped = min(_STEPS - 1, round(p * _STEPS))
    keep = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.ge(_bits(like.numel()).view(like.shape), dropped - _STEPS // 2, out=keep)
    return keep, _STEPS / (_STEPS - dropped)


def _bits(count: int) -> Tensor:
    """[count] random int16; what torch's generator has been seeded with decides them."""
    words = (count + 3) // 4
    if words <= _FEW:
        return torch.empty(words, dtype=torch.int64).random_(_LOWEST_64, None).view(torch.int16)[:count]
    generator = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))
    drawn = generator.integers(0, 2**64, words, dtype=np.uint64)
    return torch.from_numpy(drawn.view(np.int16))[:count]


class _Dropout(torch.autograd.Function):
    """x times a mask of zeros and 1 / (1 - p), and what it is added to, in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, onto: Optional[Tensor]) -> Tensor:
        keep, ctx.scale = draw(x, p)
        ctx.save_for_backward(keep)
        if onto is None:
            return _scaled(x, keep, ctx.scale)
        if onto.dtype is x.dtype:
            return torch.addcmul(onto, x, keep, value=ctx.scale)
        return torch.add(onto, x * keep, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (keep,) = ctx.saved_tensors
        return _scaled(grads[0].to(keep.dtype), keep, ctx.scale), None, grads[0] if ctx.needs_input_grad[2] else None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.addcmul(x.new_zeros(()), x, keep, value=scale)


def dropout(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
    """Set a share of the elements to zero and scale the others so that the mean stays.

    Args:
        x: any shape.
        p: the share; on the processor rounded to 1 / 65536, and scaled by what it was rounded to.
        onto: what the outcome is added to; None: nothing.
    """
    if p and x.device.type == "cpu":
        dropped: Tensor = _Dropout.apply(x, p, onto)
        return dropped
    dropped = F.dropout(x, p) if p else x
    return dropped if onto is None else onto + dropped


class Dropout(nn.Module):
    """`dropout` in training, nothing else."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, onto: Optional[Tensor] = None) -> Tensor:
        """Any shape."""
        return dropout(x, self.p if self.training else 0.0, onto)
