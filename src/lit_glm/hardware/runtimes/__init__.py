"""The runtimes that exist, and the choice between them."""

import os
from typing import Dict, List

from lit_glm.config.schema import HardwareConfig, TopologyConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.base import Runtime

NAMES = ("cpu", "cuda", "xmlir", "xpytorch", "simulated")


def set_environment(hardware: HardwareConfig) -> List[str]:
    """Set the variables of a hardware file, before its runtime is imported and never over the user's.

    Returns:
        A line for each that was left as it was.
    """
    kept = []
    for name, value in hardware.env.items():
        if os.environ.get(name, value) != value:
            kept.append(f"{name}={os.environ[name]} is set and stays; conf/hardware/{hardware.name}.yaml has {value}")
        os.environ.setdefault(name, value)
    return kept


def _classes() -> Dict[str, "type[Runtime]"]:
    from lit_glm.hardware.runtimes.cpu import CPURuntime
    from lit_glm.hardware.runtimes.cuda import CUDARuntime
    from lit_glm.hardware.runtimes.simulated import SimulatedRuntime
    from lit_glm.hardware.runtimes.xmlir import XMLIRRuntime
    from lit_glm.hardware.runtimes.xpytorch import XPyTorchRuntime

    return {
        "cpu": CPURuntime,
        "cuda": CUDARuntime,
        "xmlir": XMLIRRuntime,
        "xpytorch": XPyTorchRuntime,
        "simulated": SimulatedRuntime,
    }


def check_runtime(hardware: HardwareConfig) -> None:
    """Say that a chip's runtime is missing before anything is started; the processor's never is.

    Raises:
        InputError: what is missing, and how to rehearse without it.
    """
    names = list(hardware.runtimes) if hardware.runtime == "auto" else [hardware.runtime]
    if {"cpu", "simulated"} & set(names):
        return  # without importing torch
    classes = _classes()
    reasons = [(name, classes[name].missing()) for name in names]
    if all(reason for _, reason in reasons):
        raise InputError(_unusable(hardware, [f"  {name}: {reason}" for name, reason in reasons]))


def _unusable(hardware: HardwareConfig, reasons: List[str]) -> str:
    return (
        f"hardware={hardware.name}: none of its runtimes can be used here\n"
        + "\n".join(reasons)
        + "\nInstall one (docs/hardware.md), or rehearse without the chip: "
        f"hardware={hardware.name} hardware.runtime=simulated"
    )


def make_runtime(hardware: HardwareConfig, topology: TopologyConfig) -> Runtime:
    """Make the runtime that a hardware file asks for.

    Raises:
        InputError: if it is not there; says what is missing and how to rehearse without it.
    """
    from lit_glm.hardware.runtimes.simulated import SimulatedRuntime

    set_environment(hardware)
    classes = _classes()
    names = list(hardware.runtimes) if hardware.runtime == "auto" else [hardware.runtime]
    reasons = []
    for name in names:
        if name == "simulated":
            return SimulatedRuntime(topology.devices_per_node, hardware.memory_gib)
        reason = classes[name].missing()
        if reason is None:
            try:
                return classes[name]()
            except (RuntimeError, ImportError, OSError) as error:
                reason = str(error)
        reasons.append(f"  {name}: {reason}")
    raise InputError(_unusable(hardware, reasons))
