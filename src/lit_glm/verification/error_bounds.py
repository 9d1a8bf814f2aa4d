"""How far a result may be from the exact one, by its type and by how much is summed up (docs/verify.md).

u is a type's unit roundoff (half the distance from 1 to the next number), K the terms of a sum. A sum of K products of
random signs, accumulated in u_a, is off by about u_a sqrt(K) of its size (Higham, "Accuracy and Stability of Numerical
Algorithms", section 4.2 and 2.8: errors of random signs grow with the root), and what is stored is rounded once more.
"""

import math
from dataclasses import dataclass
from typing import Any, List

import torch
from torch import Tensor

_TF32 = 2.0**-11
_SMALLEST_HALF = 2.0**-24
_SAFETY = 4.0
"""What is allowed beyond the estimate."""
_SEVERAL = 4.0
"""The same of fused attention: probabilities, their gradients and the row sums are rounded on the way."""
_HIGHEST = 8.0
"""The largest error of many, over their root mean square, of errors that are random."""


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a floating type; a wider one than float32 counts as that."""
    return float(torch.finfo(dtype).eps) / 2 if dtype in (torch.float16, torch.bfloat16) else 2.0**-24


def operator_bound(
    dtype: torch.dtype, terms: int, tf32: bool, several: bool = False, adds_in_type: bool = False
) -> float:
    """Largest root mean square of the errors of one operator, relative to that of the exact result.

    Args:
        dtype: of the result.
        terms: K, summed up for an element of it at most.
        tf32: whether products of float32 round their inputs to TF32.
        several: whether it is several operators in one, each of which rounds to the type.
        adds_in_type: whether its sums are rounded to the type at every term.
    """
    accumulated = roundoff(dtype) if adds_in_type else _TF32 if tf32 and dtype is torch.float32 else 2.0**-24
    return (_SEVERAL if several else 1.0) * _SAFETY * (roundoff(dtype) + accumulated * math.sqrt(max(1, terms)))


def layer_bound(dtype: torch.dtype, layers: int, width: int, tf32: bool) -> float:
    """The same of what comes out of several layers: each adds errors of its own, of random signs.

    Args:
        dtype: that products are computed in.
        layers: how many.
        width: D; sums have 4 D terms.
        tf32: see above.
    """
    return operator_bound(dtype, 4 * width, tf32) * math.sqrt(1.0 + layers)


@dataclass
class RelativeError:
    """How far a result is from the exact one, relative to the exact one's size."""

    typical: float
    """Root mean square."""
    largest: float
    """Over the largest element."""

    def within(self, bound: float) -> bool:
        """Whether the whole is near enough, and no single element far off."""
        return self.typical <= bound and self.largest <= _HIGHEST * bound


def relative_error(result: Tensor, exact: Tensor, least: float = 0.0) -> RelativeError:
    """Compare.

    Args:
        result: of any device and type.
        exact: float64, on the processor.
        least: a size below which differences do not count as relative ones.
    """
    got = result.detach().cpu().double()
    if got.shape != exact.shape:
        return RelativeError(math.inf, math.inf)
    highest = float(torch.finfo(result.dtype).max)
    beyond = exact.isfinite() & (exact.abs() > highest) & ((got - exact.sign() * highest).abs() < 0.5 * highest)
    beyond |= exact.isfinite() & (exact.abs() > highest) & (got == exact.sign() * math.inf)
    got, exact = got.masked_fill(beyond, 0.0), exact.masked_fill(beyond, 0.0)
    same = (got == exact) | (got.isnan() & exact.isnan())  # infinities, and what neither can compute
    error = torch.where(same, torch.zeros_like(exact), got - exact).abs()
    if result.dtype is torch.float16:  # below its smallest number there is nothing but that and zero
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
    """The largest of each."""
    return RelativeError(max(one.typical for one in distances), max(one.largest for one in distances))


def reduction_length(inputs: List[Any], outputs: List[Any]) -> int:
    """K of an operator: its longest dimension, or all that goes into an element of the smallest result."""
    longest = max((max(tensor.shape, default=1) for tensor in (*inputs, *outputs)), default=1)
    into = max((tensor.numel() for tensor in inputs), default=1)
    smallest = min((tensor.numel() for tensor in outputs if tensor.numel()), default=1)
    return int(max(longest, into // max(1, smallest)))
