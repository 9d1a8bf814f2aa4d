"""Operations of the model that a runtime can replace, and torch's own, which are the default."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def dropout(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
    """Set a share of the elements to zero, scale the others so that the mean is preserved, and add `onto` if given."""
    dropped = F.dropout(x, p) if p else x
    return dropped if onto is None else onto + dropped


def sample_zeros(like: Tensor, p: float) -> Tuple[Tensor, float]:
    """Sample the elements that dropout sets to zero.

    Args:
        like: gives shape and device.
        p: share of zeros.

    Returns:
        For `zero_elements_`: a mask that is True for kept elements, or the positions of the zeros as integers; and the
        factor for the kept elements that preserves the mean.
    """
    kept = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
    return kept.bernoulli_(1.0 - p), 1.0 / (1.0 - p)


def zero_elements_(x: Tensor, zeros: Tensor) -> Tensor:
    """Set the elements sampled by `sample_zeros` to zero, in place; x must be contiguous."""
    if zeros.dtype is torch.bool:
        return x.mul_(zeros)
    x.view(-1).index_fill_(0, zeros, 0.0)
    return x


@dataclass(frozen=True)
class RuntimeOps:
    """Functions that the model calls; the runtime chooses their implementation."""

    linear: Callable[..., Tensor] = F.linear
    """(x [T, in], weight [out, in], bias [out] or None) -> [T, out]."""
    dropout: Callable[..., Tensor] = dropout
    """(x, share of zeros, tensor to add to or None) -> x with zeros, scaled and added."""
    sample_zeros: Callable[[Tensor, float], Tuple[Tensor, float]] = sample_zeros
    """Dropout of the probabilities in attention by matmuls."""
    checkpoint: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    """`fn(f, *args)` that recomputes f in the backward pass."""
    max_padded_group: int = 2**62
    """Rows x width of a group up to which groups are padded to equal size and computed by one call of attention."""
    max_scores_at_once: int = 2**62
    """Scores of attention by matmuls that are computed at a time; at least those of one sequence."""
    max_training_logits: int = 2**62
    """Logits of the head that are computed at a time in training in fp32; in other precisions all at once."""
    max_read_logits: int = 2**26
    """Logits that log-softmax reads at a time."""


TORCH_OPS = RuntimeOps()
