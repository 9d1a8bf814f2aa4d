"""Dropout: how much it drops, and whether its seed decides what."""

import math

import torch

from lit_glm.check_result import CheckResult
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.attention import dot_product_attention
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

    def attention_mean(dtype: torch.dtype) -> float:
        """Mean over what attention gives for equal scores and values of 1: 1, whatever dropout draws."""
        shape = (8, 8, 64, 32)
        zeros, values = torch.zeros(shape, device=ones.device, dtype=dtype), torch.ones(shape, device=ones.device)
        return float(dot_product_attention(zeros, zeros, values.to(dtype), None, _SHARE, "auto").float().mean())

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
    draws = 8 * 8 * 64 * 64
    limit = _SIGMAS * math.sqrt(_SHARE / (1 - _SHARE) / draws) + 2.0**-8  # 2 ** -8: rounding of the output to bf16
    for dtype in (torch.float32, torch.bfloat16):
        try:
            mean = attention_mean(dtype)
        except (RuntimeError, NotImplementedError):  # a type that the device lacks: the operators say so
            continue
        if abs(mean - 1.0) > limit:
            message = f"attention in {str(dtype)[6:]} with dropout {_SHARE}: mean of the output {mean:.4f} instead of 1"
            advice = "its kernel drops another share than it is given"
            return CheckResult("dropout", "fail", message, advice, abs(mean - 1.0), limit)
    return CheckResult(
        "dropout", "ok", f"drops {share:.4f}, the same for the same seed, other for another", value=off, bound=bound
    )
