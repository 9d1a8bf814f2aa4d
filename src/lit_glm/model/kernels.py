"""What a runtime may compute in its own way; by default torch's."""

from dataclasses import dataclass
from typing import Any, Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Kernels:
    """Functions that the model calls and does not choose."""

    linear: Callable[..., Tensor] = F.linear
    """(x [T, in], weight [out, in], bias [out] or None) -> [T, out]."""
    checkpoint: Callable[..., Any] = checkpoint
    """`fn(f, *args)` that recomputes f in the backward pass."""
