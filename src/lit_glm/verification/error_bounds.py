"""Error bounds of a result, by its dtype and the number of summed terms (docs/verify.md).

u is the unit roundoff of a dtype (half the distance from 1 to the next number), K the number of terms of a sum. A sum
of K products of random signs, accumulated with roundoff u_a, has a relative error of about u_a sqrt(K) (Higham,
"Accuracy and Stability of Numerical Algorithms", sections 4.2 and 2.8: errors of random signs grow with the square
root), and the stored result is rounded once more.
"""

import math
from dataclasses import dataclass
from typing import Any, List

import torch
from torch import Tensor

_TF32 = 2.0**-11
_SMALLEST_HALF = 2.0**-24
_SAFETY = 4.0
"""Safety factor on the estimate."""
_FUSED_FACTOR = 4.0
"""Further factor for fused attention, which rounds probabilities, their gradients and row sums internally."""
_MAX_TO_TYPICAL = 8.0
"""Allowed ratio of the largest to the root mean square error, for random errors."""


def roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a floating dtype; wider ones than float32 count as float32."""
    return float(torch.finfo(dtype).eps) / 2 if dtype in (torch.float16, torch.bfloat16) else 2.0**-24


def operator_bound(
    dtype: torch.dtype, terms: int, tf32: bool, is_fused: bool = False, accumulates_in_dtype: bool = False
) -> float:
    """Return the bound of an operator's root mean square error, relative to that of the exact result.

    Args:
        dtype: dtype of the result.
        terms: K, the largest number of terms summed for one element.
        tf32: whether float32 products round their inputs to TF32.
        is_fused: whether the operator fuses several, each of which rounds to the dtype.
        accumulates_in_dtype: whether its sums are rounded to the dtype at every term.
    """
    accumulated = roundoff(dtype) if accumulates_in_dtype else _TF32 if tf32 and dtype is torch.float32 else 2.0**-24
    return (_FUSED_FACTOR if is_fused else 1.0) * _SAFETY * (roundoff(dtype) + accumulated * math.sqrt(max(1, terms)))


def layer_bound(dtype: torch.dtype, layers: int, width: int, tf32: bool) -> float:
    """Return the bound after several layers, each of which adds errors of random signs.

    Args:
        dtype: dtype of the matrix products.
        layers: number of layers.
        width: D; sums have 4 D terms.
        tf32: see `operator_bound`.
    """
    return operator_bound(dtype, 4 * width, tf32) * math.sqrt(1.0 + layers)


@dataclass
class RelativeError:
    """Error of a result relative to the magnitude of the exact one."""

    typical: float
    """Root mean square of the error over that of the exact result."""
    largest: float
    """Largest error over the largest element."""

    def within(self, bound: float) -> bool:
        """Return whether the root mean square is within the bound, and no single element far off."""
        return self.typical <= bound and self.largest <= _MAX_TO_TYPICAL * bound


def relative_error(result: Tensor, exact: Tensor, least: float = 0.0) -> RelativeError:
    """Compare a result with the exact one.

    Args:
        result: on any device, of any dtype.
        exact: float64, on the CPU.
        least: smallest magnitude that errors are divided by.
    """
    got = result.detach().cpu().double()
    if got.shape != exact.shape:
        return RelativeError(math.inf, math.inf)
    highest = float(torch.finfo(result.dtype).max)
    beyond = exact.isfinite() & (exact.abs() > highest) & ((got - exact.sign() * highest).abs() < 0.5 * highest)
    beyond |= exact.isfinite() & (exact.abs() > highest) & (got == exact.sign() * math.inf)
    got, exact = got.masked_fill(beyond, 0.0), exact.masked_fill(beyond, 0.0)
    same = (got == exact) | (got.isnan() & exact.isnan())  # infinities, and NaN in both
    error = torch.where(same, torch.zeros_like(exact), got - exact).abs()
    if result.dtype is torch.float16:  # below its smallest number, results are rounded to that or to zero
        error = (error - _SMALLEST_HALF).clamp(min=0.0)
    finite = torch.where(exact.isfinite(), exact, torch.zeros_like(exact)).abs()
    if not error.numel() or not bool(error.any()):
        return RelativeError(0.0, 0.0)
    if not bool(error.isfinite().all()):
        return RelativeError(math.inf, math.inf)
    size, largest = float(finite.square().mean().sqrt()), float(finite.max())
    tiny = float(torch.finfo(torch.float32).tiny)
    return RelativeError(
        float(error.square().mean().sqrt()) / max(size, least, tiny), float(error.max()) / max(largest, least, tiny)
    )


def largest_error(distances: List[RelativeError]) -> RelativeError:
    """Return the maximum of both error measures."""
    return RelativeError(max(error.typical for error in distances), max(error.largest for error in distances))


def reduction_length(inputs: List[Any], outputs: List[Any]) -> int:
    """Return K of an operator: its longest dimension, or the inputs per element of its smallest result."""
    longest = max((max(tensor.shape, default=1) for tensor in (*inputs, *outputs)), default=1)
    into = max((tensor.numel() for tensor in inputs), default=1)
    smallest = min((tensor.numel() for tensor in outputs if tensor.numel()), default=1)
    return int(max(longest, into // max(1, smallest)))
