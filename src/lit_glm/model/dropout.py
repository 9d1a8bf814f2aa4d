"""Dropout that is cheap on CPU.

torch's own dropout draws a number for each element there and multiplies with a mask: a fifth of a training step of
GLM-Large in bf16. Here one number is drawn for each zero: its distance from the previous one. Such gaps are distributed
geometrically (Devroye 1986, Non-Uniform Random Variate Generation, chapter X.2) and looked up in a table, by 16 random
bits of numpy's SFC64 (Doty-Humphrey, https://pracrand.sourceforge.net). The positions of the zeros, a tenth of the
elements, are saved for the backward pass instead of a mask. Other devices use torch's kernel.
"""

import math
from functools import lru_cache
from typing import Any, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LOWEST_64 = -(2**63)
_STEPS = 2**16
_FEW = 2**12  # 64-bit words up to which a separate generator is slower
_FARTHEST = 2.0**40  # larger than any tensor


def sample_zeros(like: Tensor, p: float) -> Tuple[Tensor, float]:
    """Sample the elements that dropout sets to zero.

    Args:
        like: gives shape and device.
        p: share of zeros; on CPU approximated by gaps whose probabilities are multiples of 1 / 65536.

    Returns:
        For `zero_elements_`: the positions of the zeros on CPU, elsewhere a mask that is True for kept elements; and
        the factor for the kept elements that preserves the mean.
    """
    if like.device.type != "cpu":
        kept = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
        return kept.bernoulli_(1.0 - p), 1.0 / (1.0 - p)
    gaps, share = _gap_table(p)
    return _sample_zero_positions(like.numel(), gaps, share), 1.0 / (1.0 - share)


def zero_elements_(x: Tensor, zeros: Tensor) -> Tensor:
    """Set the elements sampled by `sample_zeros` to zero, in place; x must be contiguous."""
    if zeros.dtype is torch.bool:
        return x.mul_(zeros)
    x.view(-1).index_fill_(0, zeros, 0.0)
    return x


def with_zeros(x: Tensor, zeros: Tensor) -> Tensor:
    """Copy a contiguous tensor, with the elements sampled by `sample_zeros` set to zero."""
    return x * zeros if zeros.dtype is torch.bool else zero_elements_(x.clone(), zeros)


@lru_cache(maxsize=8)
def _gap_table(p: float) -> Tuple["np.ndarray[Any, Any]", float]:
    """Return [65536] equally likely distances from a zero to the next, and the share of zeros that they give."""
    quantiles = (np.arange(_STEPS) + 0.5) / _STEPS
    gaps = np.floor(np.minimum(np.log1p(-quantiles) / math.log1p(-p), _FARTHEST)).astype(np.int64) + 1
    # The largest gap adjusts the mean to 1 / p; never 1, so that some elements stay.
    gaps[-1] = max(2, gaps[-1] + round(min(_STEPS / p - float(gaps.sum()), _FARTHEST)))
    return gaps, _STEPS / float(gaps.sum())


def _sample_zero_positions(count: int, gaps: "np.ndarray[Any, Any]", share: float) -> Tensor:
    """Sample the positions of the zeros among `count` elements, in order."""
    expected = count * share
    number = int(expected + 6.0 * math.sqrt(expected)) + 8  # too few once in a billion times
    ends = np.take(gaps, _random_uint16(number)).cumsum()
    while ends[-1] <= count:
        ends = np.concatenate((ends, ends[-1] + np.take(gaps, _random_uint16(number)).cumsum()))
    return torch.from_numpy(ends[: np.searchsorted(ends, count, side="right")] - 1)


def _random_uint16(count: int) -> "np.ndarray[Any, Any]":
    """Return [count] random numbers below 65536, determined by the seed of torch's generator."""
    words = (count + 3) // 4
    if words <= _FEW:
        drawn = torch.empty(words, dtype=torch.int64).random_(_LOWEST_64, None).numpy()
    else:
        generator = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))
        drawn = generator.integers(0, 2**64, words, dtype=np.uint64)
    return drawn.view(np.uint16)[:count]


class _Dropout(torch.autograd.Function):
    """Dropout of x, scaled, and added to `onto`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, onto: Optional[Tensor]) -> Tensor:
        zeros, ctx.scale = sample_zeros(x, p)
        ctx.save_for_backward(zeros)
        ctx.dtype = x.dtype
        if onto is None:
            return zero_elements_((x * ctx.scale).contiguous(), zeros)
        return torch.add(onto, zero_elements_(x.clone(memory_format=torch.contiguous_format), zeros), alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (zeros,) = ctx.saved_tensors
        own = grads[0].to(ctx.dtype) * ctx.scale
        return zero_elements_(own.contiguous(), zeros), None, grads[0] if ctx.needs_input_grad[2] else None


def dropout(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
    """Set a share of the elements to zero and scale the others so that the mean is preserved.

    Args:
        x: any shape.
        p: share of zeros, below 1; on CPU rounded, with the scale of the rounded share.
        onto: tensor that the result is added to; None: none.
    """
    if p and x.device.type == "cpu":
        dropped: Tensor = _Dropout.apply(x, p, onto)
        return dropped
    dropped = F.dropout(x, p) if p else x
    return dropped if onto is None else onto + dropped
