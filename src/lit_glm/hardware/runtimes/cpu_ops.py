"""Operations of the model that the CPU's runtime replaces: linear layers, dropout, and limits of padding and memory.

Each gains at least 3 % of a training step of GLM-Large or a quarter of its memory (benchmarks/2026-11-28_cpu_ops.md);
everything else is torch's.
"""

import math
from functools import lru_cache
from typing import Any, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import autocast_dtype, onednn_linear
from lit_glm.hardware.monitors import cpu_info
from lit_glm.model.runtime_ops import zero_elements_

PADDED_GROUP = 2**15
"""Rows x width of a group from which arithmetic on padding takes longer than one call per group."""
ATTENTION_SCORES = 2**21
"""8 MiB in fp32, which a cache holds and the C library keeps for the next use."""
TRAINING_LOGITS, READ_LOGITS = 2**25, 2**20
"""128 and 4 MiB, for memory: `published` has gigabytes of logits, which oneDNN and log-softmax copy."""

# -- linear layers ---------------------------------------------------------------------------------------------------
# torch computes fp32 products with MKL, which is half as fast as its other library, oneDNN, on CPUs that are not
# Intel's (`benchmarks/products.py` has the measurement). Elsewhere, and in every other dtype, torch decides.

_MIN_MULTIPLY_ADDS = 2**23  # from which calling oneDNN directly is faster
_HAS_BOTH = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
PREFERS_ONEDNN = _HAS_BOTH and cpu_info("vendor_id") not in ("GenuineIntel", "")
_ONEDNN_LINEAR = onednn_linear()


def _onednn_matmul(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Multiply x by the transposed weight, with oneDNN."""
    if _ONEDNN_LINEAR is not None:
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x.contiguous().to_mkldnn(), weight.contiguous(), bias).to_dense()


class _OneDNNLinear(torch.autograd.Function):
    """Linear layer whose three products are all computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = _onednn_matmul(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Compute [T, out], [T, in] -> [out, in]; oneDNN copies the first operand, so use the order that copies less."""
    rows, outputs, inputs = len(x), grad.shape[1], x.shape[1]
    if rows * outputs <= rows * inputs + outputs * inputs:
        return _onednn_matmul(grad.t(), x.t(), None)
    return _onednn_matmul(x.t(), grad.t(), None).t().contiguous()


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Apply a linear layer, [..., in] -> [..., out].

    Args:
        x: [T, in]; with other dimensions torch's own function is used.
        weight: [out, in].
        bias: [out].
    """
    is_plain = x.device.type == "cpu" and x.dtype is torch.float32 and x.dim() == 2
    if PREFERS_ONEDNN and is_plain and len(x) * weight.numel() >= _MIN_MULTIPLY_ADDS and autocast_dtype("cpu") is None:
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


# -- dropout ---------------------------------------------------------------------------------------------------------
# torch's own dropout draws a number for each element and multiplies with a mask: a fifth of a training step of
# GLM-Large in bf16. Here one number is drawn for each zero: its distance from the previous one. Such gaps are
# distributed geometrically (Devroye 1986, Non-Uniform Random Variate Generation, chapter X.2) and looked up in a table,
# by 16 random bits of numpy's SFC64 (Doty-Humphrey, https://pracrand.sourceforge.net). The positions of the zeros, a
# tenth of the elements, are saved for the backward pass instead of a mask.

_LOWEST_64 = -(2**63)
_GAP_TABLE_SIZE = 2**16
_FEW = 2**12  # 64-bit words up to which a separate generator is slower
_MAX_GAP = 2.0**40  # larger than any tensor


def sample_zero_positions(like: Tensor, p: float) -> Tuple[Tensor, float]:
    """Sample the positions of the zeros of dropout; see `lit_glm.model.runtime_ops.sample_zeros`.

    Args:
        like: gives the shape.
        p: share of zeros, approximated by gaps whose probabilities are multiples of 1 / 65536.
    """
    gaps, share = _gap_table(p)
    count = like.numel()
    expected = count * share
    number = int(expected + 6.0 * math.sqrt(expected)) + 8  # too few once in a billion times
    ends = np.take(gaps, _random_uint16(number)).cumsum()
    while ends[-1] <= count:
        ends = np.concatenate((ends, ends[-1] + np.take(gaps, _random_uint16(number)).cumsum()))
    return torch.from_numpy(ends[: np.searchsorted(ends, count, side="right")] - 1), 1.0 / (1.0 - share)


@lru_cache(maxsize=8)
def _gap_table(p: float) -> Tuple["np.ndarray[Any, Any]", float]:
    """Return [65536] equally likely distances from a zero to the next, and the share of zeros that they give."""
    quantiles = (np.arange(_GAP_TABLE_SIZE) + 0.5) / _GAP_TABLE_SIZE
    gaps = np.floor(np.minimum(np.log1p(-quantiles) / math.log1p(-p), _MAX_GAP)).astype(np.int64) + 1
    # The largest gap adjusts the mean to 1 / p; never 1, so that some elements stay.
    gaps[-1] = max(2, gaps[-1] + round(min(_GAP_TABLE_SIZE / p - float(gaps.sum()), _MAX_GAP)))
    return gaps, _GAP_TABLE_SIZE / float(gaps.sum())


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
        zeros, ctx.scale = sample_zero_positions(x, p)
        ctx.save_for_backward(zeros)
        ctx.dtype = x.dtype
        if onto is None:
            return zero_elements_((x * ctx.scale).contiguous(), zeros)
        return torch.add(onto, zero_elements_(x.clone(memory_format=torch.contiguous_format), zeros), alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (zeros,) = ctx.saved_tensors
        grad = grads[0].to(ctx.dtype) * ctx.scale
        return zero_elements_(grad.contiguous(), zeros), None, grads[0] if ctx.needs_input_grad[2] else None


def dropout(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
    """Set a share of the elements to zero and scale the others so that the mean is preserved.

    Args:
        x: any shape.
        p: share of zeros, below 1; rounded, with the scale of the rounded share.
        onto: tensor that the result is added to; None: none.
    """
    if not p:
        return x if onto is None else onto + x
    return _Dropout.apply(x, p, onto)
