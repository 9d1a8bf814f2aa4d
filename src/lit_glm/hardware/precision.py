"""The arithmetic of a run, as Lightning plugins of our own.

Lightning's precision strings train in fp32 without an error on a device that Lightning does not know.
"""

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from pytorch_lightning.plugins.precision import Precision

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.base import Runtime


class BF16Mixed(Precision):
    """fp32 weights, matrix products in bfloat16."""

    precision: Any = "bf16-mixed"

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast around each step."""
        with torch.autocast(self._device_type, dtype=torch.bfloat16):
            yield


def make_precision(config: TrainConfig, runtime: Runtime) -> Precision:
    """The plugin of a precision.

    Raises:
        InputError: if the chip or its runtime lacks it.
    """
    name = config.precision.name
    if name == "fp32":
        if runtime.backend == "nccl":
            torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
            torch.backends.cudnn.allow_tf32 = config.precision.tf32
        return Precision()
    if name == "bf16":
        return BF16Mixed(runtime.device(0).type)
    raise InputError(f"precision={name}: not available yet on runtime {runtime.name}; take precision=fp32 or bf16")
