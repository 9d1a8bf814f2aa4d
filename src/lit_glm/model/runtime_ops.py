"""Operations of the model that a runtime can replace; torch's by default."""

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_glm.model.dropout import dropout


@dataclass(frozen=True)
class RuntimeOps:
    """Functions that the model calls; the runtime chooses their implementation."""

    linear: Callable[..., Tensor] = F.linear
    """(x [T, in], weight [out, in], bias [out] or None) -> [T, out]."""
    linear_gelu: Optional[Callable[..., Optional[Tensor]]] = None
    """Fused linear layer and tanh GELU where no gradient is needed, (x, weight, bias) -> [T, out]; None: not available.
    May return None when called, in which case the caller uses two operations."""
    dropout: Callable[..., Tensor] = dropout
    """(x, share of zeros, tensor to add to or None) -> x with zeros, scaled and added."""
    checkpoint: Callable[..., Any] = checkpoint
    """`fn(f, *args)` that recomputes f in the backward pass."""


def is_cpu_autocast_enabled() -> bool:
    """Return whether autocast is enabled on CPU."""
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # before torch 2.4
        return bool(torch.is_autocast_cpu_enabled())
