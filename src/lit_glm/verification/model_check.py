"""The whole model against the CPU in float64: layers, gradients, a short training; and its dropout."""

import math
from dataclasses import replace
from typing import List

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.attention import DotProductAttention
from lit_glm.model.runtime_ops import zero_elements_
from lit_glm.verification.error_bounds import layer_bound, relative_error
from lit_glm.verification.stepper import TrainStepper, VerifyFixture

_BACKWARD = 4.0
"""Factor for gradients: they pass twice as many products as hidden states, and similar scores cancel in the loss."""
_NEGLIGIBLE = 1e-2
"""Gradients below this share of the largest one are compared with that: they may be zero except for rounding."""
_STEPS = 25
_DRIFT = 8.0
"""Allowed drift of losses over the steps, relative to the bound of one forward pass."""


def _verdict(name: str, problem: str, success: str, advice: str, value: float, bound: float) -> CheckResult:
    """Return a failure if there is a problem, else a success."""
    return CheckResult(name, "fail" if problem else "ok", problem or success, advice if problem else "", value, bound)


def check_layers(config: TrainConfig, fixture: VerifyFixture, runtime: Runtime, tf32: bool) -> List[CheckResult]:
    """Check hidden states after every layer, scores and loss; then the gradient of every parameter."""
    exact_stages, exact_gradients = TrainStepper(config, fixture, runtime, exact=True).capture(fixture.packed)
    stepper = TrainStepper(config, fixture, runtime)
    stages, gradients = stepper.capture(fixture.packed)
    width = fixture.model.hidden_size
    worst, first = 0.0, ""
    bound = layer_bound(stepper.computes_in, fixture.model.num_layers, width, tf32)
    # The loss is a difference of scores, and as inexact as they are.
    scores = float(dict(exact_stages)["scores"].square().mean().sqrt())
    for number, ((name, actual), (_, expected)) in enumerate(zip(stages, exact_stages)):
        limit = layer_bound(stepper.computes_in, min(number + 1, fixture.model.num_layers), width, tf32)
        error = relative_error(actual.float(), expected.double(), scores if name == "loss" else 0.0)
        worst = max(worst, error.typical * bound / limit)
        if not error.within(limit) and not first:
            first = name
    problem = f"first deviation: {first}" if first else ""
    success, advice = f"{len(stages) - 3} layers, scores and loss agree", "check the operators of this layer above"
    checks = [_verdict(f"model {config.precision.name}", problem, success, advice, worst, bound)]
    bound *= _BACKWARD
    largest = max(float(gradient.square().mean().sqrt()) for gradient in exact_gradients.values())
    ranked = []
    for name, expected in exact_gradients.items():
        if name not in gradients:
            ranked.append((math.inf, name))
            continue
        ranked.append((relative_error(gradients[name], expected, _NEGLIGIBLE * largest).typical, name))
    far_off, name = max(ranked)
    problem, success = f"largest deviation: {name}" if far_off > bound else "", f"{len(ranked)} parameters agree"
    advice = "check the operators of the backward pass above"
    return [*checks, _verdict(f"gradients {config.precision.name}", problem, success, advice, far_off, bound)]


def check_training(config: TrainConfig, fixture: VerifyFixture, runtime: Runtime, tf32: bool) -> List[CheckResult]:
    """Check 25 training steps against the CPU reference, then whether the device repeats them bit by bit."""
    short = replace(config, optimizer=replace(config.optimizer, lr=1e-4, warmup=0.0))
    small = replace(fixture, model=replace(fixture.model, num_layers=min(2, fixture.model.num_layers)))

    steppers = [TrainStepper(short, small, runtime, exact) for exact in (True, False, False)]
    exact, losses, again = ([stepper.train(small.packed) for _ in range(_STEPS)] for stepper in steppers)
    bound = _DRIFT * layer_bound(steppers[1].computes_in, small.model.num_layers, small.model.hidden_size, tf32)
    distance = max(abs(loss - other) / max(1.0, abs(other)) for loss, other in zip(losses, exact))
    agrees = distance <= bound and losses[-1] < losses[0]
    problem = f"losses deviate from the CPU's (last loss {losses[-1]:.4f}, reference {exact[-1]:.4f})"
    success = f"{_STEPS} losses, {losses[0]:.4f} to {losses[-1]:.4f}, agree with the CPU reference"
    advice = "check clipping and optimizer, whose operators are listed above too"
    problem = "" if agrees else problem
    checks = [_verdict(f"training {config.precision.name}", problem, success, advice, distance, bound)]
    same = losses == again
    message = "bitwise reproducible" if same else "not bitwise reproducible"
    advice = "" if same else "results are comparable, but a resumed run differs from an uninterrupted one"
    checks.append(CheckResult(f"repeatable {config.precision.name}", "ok" if same else "warn", message, advice=advice))
    return checks


_SHARE = 0.1
_COUNT = 2**20
_SIGMAS = 6.0


def check_dropout(runtime: Runtime) -> CheckResult:
    """Check dropout of hidden states, of attention by matmuls, and of the attention in use."""
    ones, ops = torch.ones(_COUNT, device=runtime.device(0)), runtime.model_ops()

    def masks(seed: int) -> "tuple[torch.Tensor, torch.Tensor]":
        runtime.manual_seed(seed)
        return ops.dropout(ones, _SHARE).cpu(), zero_elements_(ones.clone(), ops.sample_zeros(ones, _SHARE)[0]).cpu()

    def attention_mean(dtype: torch.dtype, share: float) -> float:
        """Return the mean output of attention for equal scores and values of 1: about 1, whatever dropout draws."""
        shape = (8, 8, 64, 32)
        zeros, values = torch.zeros(shape, device=ones.device, dtype=dtype), torch.ones(shape, device=ones.device)
        out = DotProductAttention(ops=ops)(zeros, zeros, values.to(dtype), None, share)
        return float(out.float().mean())

    first, again, other = masks(1), masks(1), masks(2)
    share = max((float((mask == 0).double().mean()) for mask in first), key=lambda value: abs(value - _SHARE))
    off, bound = abs(share - _SHARE), _SIGMAS * math.sqrt(_SHARE * (1 - _SHARE) / _COUNT)
    if off > bound:
        message = f"drops {share:.4f} instead of {_SHARE}"
        return CheckResult("dropout", "fail", message, "check its generator", off, bound)
    kept = float(first[0].max())
    if abs(kept * (1 - _SHARE) - 1.0) > 1e-5:
        message = f"elements that it keeps are multiplied by {kept:.4f} instead of 1 / (1 - {_SHARE})"
        return CheckResult("dropout", "fail", message, "check its kernel")
    if not all(torch.equal(one, two) for one, two in zip(first, again)):
        advice = "runtime.manual_seed does not reach the device's generator: no run can be repeated or resumed exactly"
        return CheckResult("dropout", "fail", "the same seed gives different masks", advice=advice)
    if any(torch.equal(one, two) for one, two in zip(first, other)):
        advice = "check Runtime.manual_seed: every step would drop the same elements"
        return CheckResult("dropout", "fail", "different seeds give the same mask", advice=advice)
    draws = 8 * 8 * 64 * 64
    limit = _SIGMAS * math.sqrt(_SHARE / (1 - _SHARE) / draws) + 2.0**-8  # 2 ** -8: rounding of the output to bf16
    for dtype in (torch.float32, torch.bfloat16):
        try:
            without = attention_mean(dtype, 0.0)
            mean = attention_mean(dtype, _SHARE) / without if without else math.nan  # a wrong softmax is not dropout's
        except (RuntimeError, NotImplementedError):  # a type that the device lacks: the operators say so
            continue
        if abs(mean - 1.0) > limit:
            message = f"attention in {str(dtype)[6:]}: its mean with dropout {_SHARE} is {mean:.4f} of that without"
            advice = "its kernel drops a different share than requested"
            return CheckResult("dropout", "fail", message, advice, abs(mean - 1.0), limit)
    wrong = _wrong_backward(runtime)
    if wrong:
        advice = "training computes wrong gradients: check how forward and backward pass share the mask"
        return CheckResult("dropout", "fail", wrong, advice)
    message = f"drops {share:.4f}; reproducible by seed, different across seeds"
    return CheckResult("dropout", "ok", message, value=off, bound=bound)


def _wrong_backward(runtime: Runtime) -> str:
    """Check that dropout has the same mask in forward and backward pass; return which operation has not, else ""."""
    ops, shape = runtime.model_ops(), (8, 8, 64, 32)

    def on_device(step: float) -> torch.Tensor:
        return torch.sin(step * torch.arange(math.prod(shape))).reshape(shape).to(runtime.device(0))

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return ops.dropout(x, _SHARE)

    for name, computed in (
        ("dropout", dropped),
        ("activation checkpointing: dropout in the repeated forward pass", lambda x: ops.checkpoint(dropped, x)),
    ):
        ones = torch.ones(256, 64, device=runtime.device(0), requires_grad=True)
        runtime.manual_seed(4)
        out = computed(ones)
        out.sum().backward()
        if ones.grad is None or not torch.allclose(ones.grad.cpu(), out.detach().cpu(), rtol=1e-5, atol=0.0):
            return f"{name}: the gradient has other zeros than the output"
    # Attention is linear in the values: with one mask, (out, g) equals (v, gradient of v) for any g.
    values, weights = on_device(1.7).requires_grad_(), on_device(2.9)
    zeros = torch.zeros(shape, device=runtime.device(0))
    products = DotProductAttention(ops=ops)(zeros, zeros, values, None, _SHARE) * weights
    products.sum().backward()
    assert values.grad is not None
    forward, backward = (part.detach().cpu().double() for part in (products, values.grad * values))
    if float((forward.sum() - backward.sum()).abs()) > 0.05 * float(forward.square().sum().sqrt()):
        return "attention with dropout: the gradient has other zeros than the output"
    return ""
