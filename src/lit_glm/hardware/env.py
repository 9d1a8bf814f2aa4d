"""Environment variables of a device type; names of vendors' packages. Imports no torch, which reads the variables."""

import os
from typing import List

from lit_glm.config.schema import HardwareConfig
from lit_glm.config.secrets import MASK


def set_hardware_env(hardware: HardwareConfig) -> List[str]:
    """Set the variables of a hardware file, before its runtime is imported and never over the user's.

    Returns:
        A line for each that was left as it was.
    """
    kept = []
    for name, value in hardware.env.items():
        if value == MASK:  # of a run folder; ranks have the value in their environment
            continue
        if os.environ.get(name, value) != value:
            kept.append(f"{name}={os.environ[name]} is set and stays; conf/hardware/{hardware.name}.yaml has {value}")
        os.environ.setdefault(name, value)
    return kept


PACKAGES = ("xmlir", "xacc", "torch-xmlir", "nvidia-ml-py")
"""Distributions whose versions belong in a record of the environment."""
FRAMEWORKS = ("xmlir", "torch-xmlir")
"""Of these, what a report calls the training framework where it is installed."""
COMPILERS = ("xacc",)
"""Of these, what a report calls the training compiler."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES", "CUDART_DUMMY_REGISTER", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "CUDA_LAUNCH_BLOCKING", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Variables of runtimes that decide which devices a process sees, how these communicate, and what they compute in."""
