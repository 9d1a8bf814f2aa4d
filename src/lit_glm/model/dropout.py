"""Dropout whose masks cost little on the processor.

torch's own dropout draws one number after the other there, 32 bits and one thread each: a tenth of a training step of
GLM-Large. Here 64 random bits give four masks. Everywhere else torch's kernel is taken.
"""

from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOWEST_64 = -(2**63)
_STEPS = 2**16


def draw(like: Tensor, p: float) -> Tuple[Tensor, float]:
    """A mask of dropout.

    Args:
        like: gives shape and device.
        p: share of zeros; on the processor rounded to 1 / 65536.

    Returns:
        Boolean, true where an element stays; and what to multiply it with so that the mean stays.
    """
    if like.device.type != "cpu":
        return torch.rand(like.shape, device=like.device) >= p, 1.0 / (1.0 - p)
    dropped = min(_STEPS - 1, round(p * _STEPS))
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(_LOWEST_64, None)
    keep = bits.view(torch.int16)[:count] >= dropped - _STEPS // 2
    return keep.view(like.shape), _STEPS / (_STEPS - dropped)


class _Dropout(torch.autograd.Function):
    """x times a mask of zeros and 1 / (1 - p); the mask is kept as one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = draw(x, p)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Set a share of the elements to zero and scale the others so that the mean stays.

    Args:
        x: any shape.
        p: the share; on the processor rounded to 1 / 65536, and scaled by what it was rounded to.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped: Tensor = _Dropout.apply(x, p)
    return dropped


class Dropout(nn.Module):
    """`dropout` in training, nothing else."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return dropout(x, self.p) if self.training else x
