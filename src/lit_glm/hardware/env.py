"""Environment variables of a device type; names of vendors' packages. Imports no torch, which reads the variables."""

import os
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List

import yaml

from lit_glm.config.schema import CONF_DIR, HardwareConfig
from lit_glm.config.secrets import MASK


def hardware_file(name: str) -> str:
    """Return how messages call the file of a device type: one of conf/hardware/, or of the user's --config-dir."""
    is_shipped = (CONF_DIR / "hardware" / f"{name}.yaml").is_file()
    return f"conf/hardware/{name}.yaml" if is_shipped else f"--config-dir: hardware/{name}.yaml"


def read_hardware_files(folder: Path) -> Dict[str, Dict[str, Any]]:
    """Read the hardware files of a folder, by name; with libyaml, which is faster, where PyYAML has it."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = sorted(folder.glob("*.yaml"))
    return {file.stem: yaml.load(file.read_text(encoding="utf-8"), loader) or {} for file in files}  # noqa: S506


_ALTERNATIVE_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
"""Variables that torch also reads under a second name, if the first is not set."""
_EXPANDABLE = "expandable_segments"
"""Option of torch's allocator; before torch 2.1, the first allocation fails with it."""


def set_hardware_env(hardware: HardwareConfig) -> List[str]:
    """Set the variables of a hardware file before its runtime is imported; never overrides the user's variables.

    Returns:
        A message for each variable that keeps another value, and for each that this torch does not accept.
    """
    messages = []
    for name, value in hardware.env.items():
        if value == MASK:  # from a run folder; ranks inherit the value in their environment
            continue
        names = (name, _ALTERNATIVE_NAMES.get(name, name))
        given = next((variable for variable in names if variable in os.environ), None)
        if given is None and _EXPANDABLE in value and not _has_expandable_segments():
            messages.append(f"leaving out {name}={value} ({hardware_file(hardware.name)}): it needs torch 2.1 or later")
        elif given is None:
            os.environ[name] = value
        elif given != name or os.environ[name] != value:
            kept = f"keeping {given}={os.environ[given]} (environment)"
            messages.append(f"{kept}; {hardware_file(hardware.name)}: {'' if given == name else f'{name}='}{value}")
    return messages


def _has_expandable_segments() -> bool:
    major, minor = metadata.version("torch").split(".")[:2]
    return (int(major), int(minor)) >= (2, 1)


PACKAGES = ("xmlir", "xacc", "torch-xmlir", "nvidia-ml-py")
"""Python distributions whose versions are written to environment.json."""
FRAMEWORKS = ("xmlir", "torch-xmlir")
"""Entries of `PACKAGES` that a report lists as training framework."""
COMPILERS = ("xacc",)
"""Entries of `PACKAGES` that a report lists as training compiler."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES", "CUDART_DUMMY_REGISTER", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "CUDA_LAUNCH_BLOCKING", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Variables of runtimes that decide which devices a process sees, how these communicate, and what they compute in."""
