"""torch_xmlir.amp: the interface of torch's GradScaler, for tensors that are not on CUDA."""

from typing import Any, Dict

import torch


class GradScaler:
    def __init__(self, init_scale: float = 65536.0, growth_interval: int = 2000) -> None:
        self._scale, self._interval, self._good, self._overflow = init_scale, growth_interval, 0, False

    def get_scale(self) -> float:
        return self._scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._scale

    def unscale_(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self._scale)
                    self._overflow |= not bool(torch.isfinite(parameter.grad).all())

    def update(self) -> None:
        if self._overflow:
            self._scale, self._good = self._scale / 2, 0
        else:
            self._good += 1
            if self._good == self._interval:
                self._scale, self._good = self._scale * 2, 0
        self._overflow = False

    def state_dict(self) -> Dict[str, Any]:
        return {"scale": self._scale, "_growth_tracker": self._good}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._scale, self._good = state["scale"], state["_growth_tracker"]
