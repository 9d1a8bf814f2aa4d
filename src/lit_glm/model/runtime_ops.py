"""What a runtime may compute in its own way; by default torch's."""

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_glm.model.dropout import dropout


@dataclass(frozen=True)
class RuntimeOps:
    """Functions that the model calls and does not choose."""

    linear: Callable[..., Tensor] = F.linear
    """(x [T, in], weight [out, in], bias [out] or None) -> [T, out]."""
    linear_gelu: Optional[Callable[..., Optional[Tensor]]] = None
    """A linear layer and GELU by its tanh approximation in one, (x, weight, bias) -> [T, out], where no gradient is
    needed; its answer None: in two. None: there is no such product."""
    dropout: Callable[..., Tensor] = dropout
    """(x, share of zeros, tensor to add to or None) -> x with zeros, scaled and added."""
    checkpoint: Callable[..., Any] = checkpoint
    """`fn(f, *args)` that recomputes f in the backward pass."""


def is_cpu_autocast_enabled() -> bool:
    """Whether a processor's products are computed in another type than they are given in."""
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # before torch 2.4
        return bool(torch.is_autocast_cpu_enabled())
