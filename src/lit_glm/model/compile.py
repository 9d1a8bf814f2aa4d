"""torch.compile of a layer's part behind attention: one graph for training, one for evaluation, for any number of rows.

That part has no shape but [rows, width], so that its graph serves all layers and all batches. The norm, the projection
and the attention before it stay eager: what attention computes depends on the layout of each batch. Dropout draws the
same zeros as without compilation, so that the losses are equal up to rounding.
"""

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.errors import InputError
from lit_glm.model.dropout import sample_zeros
from lit_glm.model.runtime_ops import RuntimeOps


@lru_cache(maxsize=None)
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function once for the process, with dynamic shapes; the first call of each mode takes seconds."""
    # Two small graphs need no pool of compiler processes, which would outlive a run that is killed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    _register_cpu_dropout_mask()
    # Without the fallback Inductor draws random numbers of its own, other than those of the eager mode.
    made = torch.compile(function, dynamic=True, options={"fallback_random": True})

    def call(*arguments: Any) -> Tensor:
        return made(*(_as_whole(part) if isinstance(part, Tensor) else part for part in arguments))

    return call


def _as_whole(x: Tensor) -> Tensor:
    """Copy a part of a larger tensor: its graph would depend on the size of the whole too."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def check_compile_available(device: torch.device) -> None:
    """Compile a small function on a device.

    Raises:
        InputError: if this torch, its compiler or the device's backend cannot.
    """
    if not hasattr(torch, "compile"):
        raise InputError(f"model.compile=true: torch {torch.__version__} has no torch.compile; use model.compile=false")
    try:
        found = compiled(_probe)(torch.ones(4, device=device))
        if not bool((found == 2.0).all()):
            raise RuntimeError("wrong result of a test function")
    except Exception as error:  # whatever a compiler or a vendor's backend raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"model.compile=true: torch.compile does not work on {device.type} here ({reason.strip()}); "
            "use model.compile=false"
        ) from error


def _probe(x: Tensor) -> Tensor:
    return F.gelu(x) * 0.0 + 2.0


def traceable(kernels: RuntimeOps) -> RuntimeOps:
    """Replace what a compiler cannot look into, a runtime's own functions, by torch's."""
    return replace(kernels, linear=F.linear, linear_gelu=None, dropout=traceable_dropout)


def traceable_dropout(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
    """Dropout of which a compiler sees all but the drawing; arguments as for `lit_glm.model.dropout.dropout`."""
    if p and x.device.type == "cpu":
        mask, factor = torch.ops.lit_glm.cpu_dropout_mask(x.detach(), p)
        x = x * mask * factor
    elif p:
        x = F.dropout(x, p)
    return x if onto is None else onto + x


@lru_cache(maxsize=None)
def _register_cpu_dropout_mask() -> None:
    """Register an operator that the compiler does not look into: (x, p) -> mask of what stays, and its factor."""

    def draw(x: Tensor, p: float) -> "tuple[Tensor, Tensor]":
        zeros, factor = sample_zeros(x, p)
        mask = torch.ones(x.numel(), dtype=torch.bool).index_fill_(0, zeros, False)
        return mask.view(x.shape), torch.tensor(factor)

    tags = (torch.Tag.nondeterministic_seeded,)  # two calls are never merged into one
    operator = torch.library.custom_op(
        "lit_glm::cpu_dropout_mask", draw, mutates_args=(), schema="(Tensor x, float p) -> (Tensor, Tensor)", tags=tags
    )
    operator.register_fake(lambda x, p: (torch.empty(x.shape, dtype=torch.bool), torch.empty(())))
