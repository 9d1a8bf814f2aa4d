"""Dynamic loss scaling: gradients of a half-precision model are computed of a multiplied loss, so that few are lost."""

from typing import Any, Dict

from torch import Tensor

from lit_glm.compat import multiply_all_
from lit_glm.config.schema import LossScaleConfig

_FACTOR = 2.0


class DynamicLossScale:
    """The rule of the published runs: Megatron's `DynamicLossScaler` with a delayed shift, not consecutive.

    An overflow halves the scale, but the first `hysteresis - 1` of them are forgiven; the allowance is renewed when
    the scale doubles, which it does after every `window` steps without an overflow.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.scale = float(config.initial)
        self._forgiven_left = config.hysteresis - 1
        self._good_steps = 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss that is differentiated."""
        return loss * self.scale

    def unscale_(self, optimizer: Any) -> None:
        """Take the scale out of the gradients of an optimizer's parameters."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        multiply_all_([parameter.grad for parameter in parameters if parameter.grad is not None], 1.0 / self.scale)

    def update(self, overflow: bool) -> None:
        """Count a step.

        Args:
            overflow: whether its gradients were not finite, on any rank.
        """
        if overflow:
            self._good_steps = 0
            if self._forgiven_left > 0:
                self._forgiven_left -= 1
            else:
                self.scale = max(self.scale / _FACTOR, self._config.minimum)
            return
        self._good_steps += 1
        if self._good_steps % self._config.window == 0:
            self.scale *= _FACTOR
            self._forgiven_left = self._config.hysteresis - 1

    def state_dict(self) -> Dict[str, float]:
        """For a checkpoint."""
        return {"scale": self.scale, "forgiven_left": self._forgiven_left, "good_steps": self._good_steps}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """From a checkpoint."""
        self.scale = float(state["scale"])
        self._forgiven_left = int(state["forgiven_left"])
        self._good_steps = int(state["good_steps"])


class VendorLossScale:
    """A runtime's own GradScaler (torch's interface) in the place of `DynamicLossScale`, with its own rule."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    @property
    def scale(self) -> float:
        """What the next loss is multiplied with."""
        return float(self._scaler.get_scale())

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss that is differentiated."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale_(self, optimizer: Any) -> None:
        """Take the scale out of the gradients; the scaler notes overflows meanwhile."""
        self._scaler.unscale_(optimizer)

    def update(self, overflow: bool) -> None:
        """Adapt the scale to what `divide` has seen."""
        self._scaler.update()

    def state_dict(self) -> Dict[str, Any]:
        """For a checkpoint."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """From a checkpoint."""
        self._scaler.load_state_dict(state)
