"""AdamW with two parameter groups, and the published learning-rate schedule."""

from functools import partial
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_glm.compat import has_fused_adamw
from lit_glm.config.schema import OptimizerConfig
from lit_glm.errors import first_line


def learning_rate_at_step(step: int, highest: float, warmup: float, decay_iters: float, decay_ratio: float) -> float:
    """Return the learning rate after `step` updates: linear warm-up, linear decay to `decay_ratio` times `highest`.

    Args:
        step: updates done; the first update uses step 0, so its rate is 0.
        highest: peak learning rate.
        warmup: share of `decay_iters`; not rounded to whole steps.
        decay_iters: updates after which the rate stays at its lowest.
        decay_ratio: lowest rate / highest.
    """
    warmup_steps = warmup * decay_iters
    if step <= warmup_steps and warmup_steps > 0:
        return highest * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / (decay_iters - warmup_steps)) if decay_iters > warmup_steps else 1.0
    return highest - highest * (1.0 - decay_ratio) * done


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> LambdaLR:
    """Create the schedule of an optimizer; it advances by one per update."""
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # which LambdaLR multiplies by the value of its function
    return LambdaLR(optimizer, partial(_scheduled_rate, config))


def _scheduled_rate(config: OptimizerConfig, updates: int) -> float:
    decay_iters = config.lr_decay_iters // config.gradient_accumulation_steps
    return learning_rate_at_step(updates, config.lr, config.warmup, decay_iters, config.lr_decay_ratio)


def parameter_groups(model: nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Split parameters as published: decay on all weights and embeddings, none on layer norms and biases."""
    decayed: List[Any] = []
    plain: List[Any] = []
    for name, parameter in model.named_parameters():
        is_plain = name.endswith("bias") or "layernorm" in name
        (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def clip_gradients(parameters: List[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their joint L2 norm is at most `max_norm`; return the norm before.

    As torch's `clip_grad_norm_`, except in fp32 on the CPU: there torch (up to 2.13) adds all squares of a tensor in
    eight running sums, so that the norm of the 31 million gradients of GLM-Large's word embedding is up to 0.2 % too
    low. Here each row is added up by itself.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not all(gradient.device.type == "cpu" and gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(gradient, dim=-1)) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Create AdamW (Loshchilov and Hutter 2019), fused if torch supports it on the parameters' device."""
    arguments: Dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if has_fused_adamw() and fused_unavailable_reason(next(model.parameters()).device) is None:
        arguments["fused"] = True
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), **arguments)


def fused_unavailable_reason(device: torch.device) -> Optional[str]:
    """Return why fused AdamW is unavailable on a device, as tested on four parameters; None if it works."""

    def updated(**options: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(4, device=device))
        weight.grad = torch.full_like(weight, 0.5)
        torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, **options).step()
        return weight.detach()

    try:
        fused = updated(fused=True)
        right = bool(torch.allclose(fused, updated(), rtol=1e-5))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        return first_line(error)
    return None if right else f"it gives {fused[0].item():g}, the default implementation {updated()[0].item():g}"
