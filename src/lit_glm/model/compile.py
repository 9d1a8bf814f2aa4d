"""torch.compile of a layer's part behind attention: one graph for training, one for evaluation, for any number of rows.

That part has no shape but [rows, width], so that its graph serves all layers and all batches. The norm, the projection
and the attention before it stay eager: what attention computes depends on the layout of each batch. Dropout draws the
same zeros as without compilation, so that the losses are equal up to rounding.
"""

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import has_compile, keep_graphs_whole
from lit_glm.errors import InputError, first_line
from lit_glm.model.runtime_ops import RuntimeOps, dropout, sample_zeros


@lru_cache(maxsize=None)
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function once for the process, with dynamic shapes; the first call of each mode takes seconds."""
    # Two small graphs need no pool of compiler processes, which would outlive a run that is killed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    keep_graphs_whole()
    # Without the fallback Inductor draws random numbers of its own, other than those of the eager mode.
    made = torch.compile(function, dynamic=True, options={"fallback_random": True})

    def call(*arguments: Any) -> Tensor:
        return made(*(_own_storage(part) if isinstance(part, Tensor) else part for part in arguments))

    return call


def _own_storage(x: Tensor) -> Tensor:
    """Copy a part of a larger tensor: its graph would depend on the size of the whole too."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def check_compile_available(device: torch.device) -> None:
    """Compile a small function on a device.

    Raises:
        InputError: if this torch, its compiler or the device's backend cannot.
    """
    if not has_compile():
        version = torch.__version__
        raise InputError(f"model.compile=true: needs torch 2.5, this is torch {version}; use model.compile=false")
    try:
        result = compiled(_probe)(torch.ones(4, device=device))
        if not bool((result == 2.0).all()):
            raise RuntimeError("wrong result of a test function")
    except Exception as error:  # whatever a compiler or a vendor's backend raises
        raise InputError(
            f"model.compile=true: torch.compile does not work on {device.type} here ({first_line(error)}); "
            "use model.compile=false"
        ) from error


def _probe(x: Tensor) -> Tensor:
    return F.gelu(x) * 0.0 + 2.0


def traceable(ops: RuntimeOps) -> RuntimeOps:
    """Replace what a compiler cannot look into, a runtime's own functions, by torch's."""
    traceable_dropout = dropout if ops.sample_zeros is sample_zeros else _traceable_dropout(ops.sample_zeros)
    return replace(ops, linear=F.linear, dropout=traceable_dropout)


@lru_cache(maxsize=None)
def _traceable_dropout(sample: Callable[[Tensor, float], Tuple[Tensor, float]]) -> Callable[..., Tensor]:
    """Return a dropout by a runtime's sampled positions, of which a compiler sees all but the sampling."""

    def draw(x: Tensor, p: float) -> Tuple[Tensor, Tensor]:
        zeros, factor = sample(x, p)
        if zeros.dtype is not torch.bool:
            zeros = torch.ones(x.numel(), dtype=torch.bool, device=x.device).index_fill_(0, zeros, False)
        return zeros.view(x.shape), torch.tensor(factor)

    operator = torch.library.custom_op(
        "lit_glm::dropout_mask",
        draw,
        mutates_args=(),
        schema="(Tensor x, float p) -> (Tensor, Tensor)",
        tags=(torch.Tag.nondeterministic_seeded,),  # two calls are never merged into one
    )
    operator.register_fake(lambda x, p: (x.new_empty(x.shape, dtype=torch.bool), torch.empty(())))

    def traced(x: Tensor, p: float, onto: Optional[Tensor] = None) -> Tensor:
        if p:
            mask, factor = operator(x.detach(), p)
            x = x * mask * factor
        return x if onto is None else onto + x

    return traced
