"""Precision of a run, as Lightning plugins of our own, and dynamic loss scaling.

Lightning's precision strings train in fp32 without an error on a device that Lightning does not know. These plugins
compute in the precision of their name, and `check_precision_on_device` tries it on the device before a run relies
on it.
"""

import math
import warnings
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, Optional

import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn

from lit_glm.compat import copy_all_, multiply_all_
from lit_glm.config.schema import LossScaleConfig, TrainConfig
from lit_glm.errors import InputError, first_line
from lit_glm.hardware.env import hardware_file
from lit_glm.hardware.runtimes.base import Runtime

_FACTOR = 2.0


class DynamicLossScale:
    """Loss scale by the rule of the published runs: Megatron's `DynamicLossScaler`, `delayed_shift` not consecutive.

    An overflow halves the scale, except for the first `hysteresis - 1` overflows; this allowance is renewed when the
    scale doubles, which it does after every `window` steps without an overflow. The interface is that of torch's
    GradScaler, so that a runtime's own can take its place; only `update` has an argument more.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self._scale = float(config.initial)
        self._overflows_left = config.hysteresis - 1
        self._good_steps = 0

    def get_scale(self) -> float:
        """Return the factor that the next loss is multiplied by."""
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        """Scale the loss for the backward pass."""
        return loss * self._scale

    def unscale_(self, optimizer: Any) -> None:
        """Unscale the gradients of an optimizer's parameters."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        multiply_all_([parameter.grad for parameter in parameters if parameter.grad is not None], 1.0 / self._scale)

    def update(self, overflow: bool) -> None:
        """Update the scale after a step.

        Args:
            overflow: whether its gradients were not finite, on any rank.
        """
        if overflow:
            self._good_steps = 0
            if self._overflows_left > 0:
                self._overflows_left -= 1
            else:
                self._scale = max(self._scale / _FACTOR, self._config.minimum)
            return
        self._good_steps += 1
        if self._good_steps % self._config.window == 0:
            self._scale *= _FACTOR
            self._overflows_left = self._config.hysteresis - 1

    def state_dict(self) -> Dict[str, float]:
        """Return the state for a checkpoint."""
        return {"scale": self._scale, "forgiven_left": self._overflows_left, "good_steps": self._good_steps}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._scale = float(state["scale"])
        self._overflows_left = int(state["forgiven_left"])
        self._good_steps = int(state["good_steps"])


class FP32Precision(Precision):
    """Precision plugin for plain fp32: no autocast, no loss scaling."""

    computes_in = torch.float32


def backward_context(loss: Tensor) -> ContextManager[Any]:
    """Leave autocast for the backward pass, as torch's documentation asks.

    A GPU's backward pass runs in a thread of its own, which before torch 2.5 inherited that autocast is on but not its
    type: products of a bf16 step were computed in fp16 there (https://github.com/pytorch/pytorch/issues/133938).
    """
    return torch.autocast(loss.device.type, enabled=False) if loss.is_cuda else nullcontext()


class _AutocastPrecision(Precision):
    """Autocast of a step or an evaluation; the backward pass is outside of it."""

    computes_in = torch.float16

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def forward_context(self) -> ContextManager[Any]:
        """Return the autocast context of a step or an evaluation."""
        return self._runtime.autocast(self.computes_in)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Propagate the gradients of the loss."""
        with backward_context(tensor):
            super().backward(tensor, model, optimizer, *args, **kwargs)


class BF16Precision(_AutocastPrecision):
    """Mixed precision in bf16: fp32 weights."""

    precision: Any = "bf16-mixed"
    computes_in = torch.bfloat16


class LossScalingPrecision(Precision):
    """Loss scaling shared by amp and fp16: scale the loss, unscale gradients, skip steps that overflow."""

    scaler: Any
    """A `DynamicLossScale`, or a runtime's own scaler, which notices overflows itself and has its own rule."""

    @property
    def loss_scale(self) -> float:
        """Factor that the next loss is multiplied by."""
        return float(self.scaler.get_scale())

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        """Scale the loss."""
        self._before_backward(module)
        return super().pre_backward(self.scaler.scale(tensor.float()), module)

    def _before_backward(self, module: Any) -> None:
        """Prepare the gradients of an earlier micro-batch for accumulation."""

    def unscale_(self, optimizer: Any) -> None:
        """Unscale the gradients of the optimizer's parameters, in fp32."""
        self.scaler.unscale_(optimizer)

    def update_scale(self, norm: Tensor) -> bool:
        """Update the scale by the norm of the gradients.

        Args:
            norm: norm of all gradients, before clipping. It is computed anyway, and finite only if each gradient is.

        Returns:
            Whether all gradients are finite; if not, the step must be skipped. All ranks agree, because gradients are
            the same on every rank after averaging.
        """
        finite = math.isfinite(float(norm))
        self.scaler.update(*([not finite] if isinstance(self.scaler, DynamicLossScale) else []))
        return finite

    def state_dict(self) -> Dict[str, Any]:
        """Return the state for a checkpoint."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.scaler.load_state_dict(state_dict)


class AMPPrecision(LossScalingPrecision, _AutocastPrecision):
    """Mixed precision in fp16 with fp32 weights; uses the runtime's own loss scaler if it has one."""

    precision: Any = "16-mixed"

    def __init__(self, runtime: Runtime, config: LossScaleConfig) -> None:
        super().__init__(runtime)
        self.scaler = runtime.loss_scaler(config) or DynamicLossScale(config)

    def _before_backward(self, module: Any) -> None:
        # Gradients of an earlier micro-batch are already unscaled.
        multiply_all_([p.grad for p in module.parameters() if p.grad is not None], self.loss_scale)


class FP16Precision(LossScalingPrecision):
    """fp16 precision: fp16 weights, activations and gradients; fp32 master weights in the optimizer."""

    precision: Any = "16-true"
    computes_in = torch.float16

    def __init__(self, config: LossScaleConfig) -> None:
        super().__init__()
        self.scaler = DynamicLossScale(config)
        self._weights: List[Tensor] = []
        self._masters: List[Tensor] = []
        self._restored: Optional[List[Tensor]] = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights to fp16."""
        return module.half()

    def wrap_optimizers(self, optimizers: List[Any]) -> None:
        """Replace the optimizers' parameters by fp32 master weights; called after the move to the device."""
        self._weights, self._masters = [], []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                masters = [nn.Parameter(weight.detach().float()) for weight in group["params"]]
                self._weights += group["params"]
                self._masters += masters
                group["params"] = masters
        if self._restored is not None:  # some Lightning versions restore plugins before this call
            self._restore_masters(self._restored)

    def unscale_(self, optimizer: Any) -> None:
        """Add the unscaled gradients, in fp32, to those of the master weights."""
        pairs = [(weight, master) for weight, master in zip(self._weights, self._masters) if weight.grad is not None]
        wide = [torch.empty_like(weight, dtype=torch.float32) for weight, _ in pairs]
        copy_all_(wide, [weight.grad for weight, _ in pairs])
        multiply_all_(wide, 1.0 / self.loss_scale)
        for (weight, master), gradient in zip(pairs, wide):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None  # the optimizer's zero_grad only sees the master weights

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Update the master weights and round them into the model's weights."""
        outcome = super().optimizer_step(optimizer, **kwargs)
        self.round_weights()
        return outcome

    def round_weights(self) -> None:
        """Round the master weights into the model's weights."""
        with torch.no_grad():
            copy_all_(self._weights, self._masters)

    def state_dict(self) -> Dict[str, Any]:
        """Return the scale and the master weights, because the model's weights are rounded."""
        return {**super().state_dict(), "masters": [master.detach() for master in self._masters]}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        super().load_state_dict(state_dict)
        self._restored = state_dict["masters"]
        if self._masters:
            self._restore_masters(self._restored)

    def _restore_masters(self, masters: List[Tensor]) -> None:
        with torch.no_grad():
            copy_all_(self._masters, masters)
        self.round_weights()
        self._restored = None


def make_precision(config: TrainConfig, runtime: Runtime, index: int = 0, check_on_device: bool = True) -> Precision:
    """Create the plugin of a precision.

    Args:
        config: run configuration.
        runtime: runtime of the device.
        index: index of this rank's device, on which a small product is computed; no other device is touched.
        check_on_device: whether to compute that product.

    Raises:
        InputError: if the device or its runtime does not support the precision.
    """
    name, hardware = config.precision.name, config.hardware
    if name not in hardware.precisions:
        raise InputError(
            f"precision={name}: not supported by {hardware.product_name or hardware.name}; supported: "
            f"{', '.join(hardware.precisions)} ({hardware_file(hardware.name)})"
        )
    runtime.allow_tf32(config.precision.tf32)
    scaling = config.precision.loss_scale or LossScaleConfig()
    plugin: Any = {
        "fp32": lambda: FP32Precision(),
        "amp": lambda: AMPPrecision(runtime, scaling),
        "fp16": lambda: FP16Precision(scaling),
        "bf16": lambda: BF16Precision(runtime),
    }[name]()
    if not check_on_device:
        return plugin
    try:
        check_precision_on_device(plugin, runtime.device(index))
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"precision={name}: not supported by runtime {runtime.name} with torch {torch.__version__} ({reason}); "
            "use precision=fp32, or another precision or runtime of this device"
        ) from error
    return plugin


def check_precision_on_device(plugin: Any, device: torch.device) -> None:
    """Run a small layer forward and backward, and check the dtype of its output.

    Raises:
        RuntimeError: if the dtype is wrong; also whatever torch raises for an operation that it lacks.
    """
    layer = plugin.convert_module(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()).to(device))
    x = torch.ones(2, 8, device=device, dtype=next(layer.parameters()).dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with plugin.forward_context():
            out = layer(x)
            torch.softmax(out @ out.transpose(0, 1), dim=-1).float().sum().backward()
    if out.dtype is not plugin.computes_in:
        raise RuntimeError(f"a matrix product returned {out.dtype} instead of {plugin.computes_in}")
