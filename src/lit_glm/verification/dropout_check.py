"""Dropout: how much it drops, and whether its seed decides what."""

import math

import torch

from lit_glm.check_result import CheckResult
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.dropout import dropout, sample_zeros, zero_elements_

_SHARE = 0.1
_COUNT = 2**20
_SIGMAS = 6.0


def check_dropout(runtime: Runtime) -> CheckResult:
    """Both ways in which masks are drawn: of hidden states, and of attention where products compute it."""
    ones = torch.ones(_COUNT, device=runtime.device(0))

    def masks(seed: int) -> "tuple[torch.Tensor, torch.Tensor]":
        runtime.manual_seed(seed)
        return dropout(ones, _SHARE).cpu(), zero_elements_(ones.clone(), sample_zeros(ones, _SHARE)[0]).cpu()

    first, again, other = masks(1), masks(1), masks(2)
    share = max((float((mask == 0).double().mean()) for mask in first), key=lambda value: abs(value - _SHARE))
    off, bound = abs(share - _SHARE), _SIGMAS * math.sqrt(_SHARE * (1 - _SHARE) / _COUNT)
    if off > bound:
        return CheckResult(
            "dropout", "fail", f"drops {share:.4f} instead of {_SHARE}", "look at its generator", off, bound
        )
    if not all(torch.equal(one, two) for one, two in zip(first, again)):
        advice = "runtime.manual_seed does not reach the device's generator: no run can be repeated or resumed exactly"
        return CheckResult("dropout", "fail", "the same seed draws another mask", advice=advice)
    if any(torch.equal(one, two) for one, two in zip(first, other)):
        return CheckResult(
            "dropout", "fail", "another seed draws the same mask", advice="every step would drop the same"
        )
    return CheckResult(
        "dropout", "ok", f"drops {share:.4f}, the same for the same seed, other for another", value=off, bound=bound
    )
