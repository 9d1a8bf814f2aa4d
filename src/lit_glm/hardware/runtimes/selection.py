"""The runtimes that exist, simulated devices included, and the choice between them."""

import importlib
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torch

from lit_glm.config.key_aliases import find_old_methods
from lit_glm.config.schema import HardwareConfig, TopologyConfig
from lit_glm.errors import InputError, first_line
from lit_glm.hardware.device_monitor import monitor_of_name
from lit_glm.hardware.env import hardware_file, read_hardware_files, set_hardware_env
from lit_glm.hardware.monitors import is_mig_slice
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.hardware.runtimes.cuda import CUDARuntime
from lit_glm.hardware.runtimes.kunlunxin import XMLIRRuntime, XPyTorchRuntime

BUILT_IN_RUNTIMES = ("cpu", "cuda", "xmlir", "xpytorch")
"""Runtimes that a hardware file can list; `simulated` works with any file."""
TARGET_KEY = "_target_"
"""Name of the runtime of a hardware file that gives a class of an external package."""


class SimulatedRuntime(CPURuntime):
    """Simulated devices with indices and a memory size; tensors are on the CPU, the backend is gloo."""

    name = "simulated"
    simulated = True
    shares_memory = False

    def __init__(self, num_devices: int, memory_gib: Optional[float]) -> None:
        """Set the devices.

        Args:
            num_devices: number of devices of this node.
            memory_gib: memory of each.
        """
        super().__init__()
        self._devices = num_devices
        self._memory_gib = memory_gib

    def device_count(self) -> int:
        return self._devices

    def device(self, index: int) -> torch.device:
        """Return the CPU, for a valid index."""
        if not 0 <= index < self._devices:
            raise InputError(f"device {index} does not exist: {self._devices} devices are simulated")
        return torch.device("cpu")

    def precision_hint(self, name: str) -> str:
        """Return no hint: times of a dry run are not measurements."""
        return ""

    def device_name(self, index: int) -> str:
        return "simulated"

    def total_memory(self, index: int) -> Optional[float]:
        return None if self._memory_gib is None else self._memory_gib * 2**30


def import_runtime_class(target: str) -> "type[Runtime]":
    """Import the runtime class of an external package.

    Args:
        target: package.module.Class, as in `_target_` of a hardware file.

    Raises:
        InputError: if there is no such class, or if it is not a Runtime.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise InputError(f"hardware._target_={target}: give package.module.Class, with the module (docs/new_chip.md)")
    try:
        runtime_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"hardware._target_={target}: cannot be imported ({error}); give package.module.Class of a package that "
            f"is installed in this environment ({sys.executable})"
        ) from error
    if not (isinstance(runtime_class, type) and issubclass(runtime_class, Runtime)):
        raise InputError(
            f"hardware._target_={target}: not a subclass of lit_glm.hardware.runtimes.base.Runtime (docs/new_chip.md)"
        )
    if runtime_class.monitor:
        monitor_of_name(runtime_class.monitor)
    renamed = find_old_methods(runtime_class)
    if renamed:
        raise InputError(
            f"hardware._target_={target}: uses names of an older lit_glm; rename them ({', '.join(renamed)}), see "
            "docs/new_chip.md"
        )
    return runtime_class


def _runtime_classes(hardware: HardwareConfig) -> Dict[str, "type[Runtime]"]:
    imported = {} if hardware._target_ is None else {TARGET_KEY: import_runtime_class(hardware._target_)}
    built_in = (CPURuntime, CUDARuntime, XMLIRRuntime, XPyTorchRuntime, SimulatedRuntime)
    return {**imported, **{runtime.name: runtime for runtime in built_in}}


def _candidate_runtimes(hardware: HardwareConfig) -> List[str]:
    """List the allowed runtimes, best first; none that would report another device's measurements under this name."""
    if hardware._target_ is not None:
        if hardware.runtime not in ("auto", "simulated"):
            raise InputError(
                f"hardware.runtime={hardware.runtime}: hardware={hardware.name} has its own class "
                f"(_target_: {hardware._target_}), which requires hardware.runtime=auto; remove the key"
            )
        return ["simulated"] if hardware.runtime == "simulated" else [TARGET_KEY]
    unknown = sorted(set(hardware.runtimes) - set(BUILT_IN_RUNTIMES))
    if unknown or not (hardware.runtimes or hardware.runtime == "simulated"):
        raise InputError(
            f"hardware.runtimes=[{', '.join(hardware.runtimes)}] ({hardware_file(hardware.name)}): must be one or "
            f"more of {', '.join(BUILT_IN_RUNTIMES)}"
        )
    if hardware.product_name and "cpu" in hardware.runtimes:
        raise InputError(
            f"hardware.runtimes=[{', '.join(hardware.runtimes)}]: would report measurements of the CPU as those of "
            f"{hardware.product_name}; use hardware.runtime=simulated for a dry run"
        )
    if hardware.runtime == "auto":
        return list(hardware.runtimes)
    if hardware.runtime not in ("simulated", *hardware.runtimes):
        raise InputError(
            f"hardware.runtime={hardware.runtime}: hardware={hardware.name} runs on {', '.join(hardware.runtimes)} "
            "(auto: the first available); for a dry run use hardware.runtime=simulated"
        )
    return [hardware.runtime]


def check_runtime_available(hardware: HardwareConfig, topology: TopologyConfig) -> None:
    """Check that a runtime is available before anything is started; cpu and simulated always are.

    Raises:
        InputError: what is missing, and how to do a dry run without it; or why it cannot span these nodes.
    """
    names = _candidate_runtimes(hardware)
    if {"cpu", "simulated"} & set(names):
        return  # without importing torch
    classes = _runtime_classes(hardware)
    reasons = [(name, classes[name].unavailable_reason()) for name in names]
    available = [name for name, reason in reasons if reason is None]
    if not available:
        raise InputError(_unavailable_message(hardware, [f"  {name}: {reason}" for name, reason in reasons]))
    unable = classes[available[0]].multi_node_unsupported_reason(topology.num_nodes)
    if unable is not None:
        raise InputError(f"topology={topology.name}: {unable}")


def _unavailable_message(hardware: HardwareConfig, reasons: List[str]) -> str:
    ways = dict.fromkeys(_runtime_classes(hardware)[name].install_hint for name in _candidate_runtimes(hardware))
    return (
        f"hardware={hardware.name}: none of its runtimes can be used here\n"
        + "\n".join(reasons)
        + "".join(f"\nInstall it: {way}" for way in ways if way)
        + "\nor do a dry run without the device: "
        f"hardware={hardware.name} hardware.runtime=simulated"
    )


def make_runtime(hardware: HardwareConfig, topology: TopologyConfig) -> Runtime:
    """Create the runtime of a hardware file.

    Raises:
        InputError: if it is not available; states what is missing and how to do a dry run without it.
    """
    set_hardware_env(hardware)
    classes, reasons = _runtime_classes(hardware), []
    for name in _candidate_runtimes(hardware):
        if name == "simulated":
            return SimulatedRuntime(topology.devices_per_node, hardware.memory_gib)
        reason = classes[name].unavailable_reason()
        if reason is None:
            try:
                return classes[name]()
            except Exception as error:  # whatever a vendor's package raises
                kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
                reason = f"{kind}{first_line(error)}"
        reasons.append(f"  {name}: {reason}")
    raise InputError(_unavailable_message(hardware, reasons))


def computes_on_cpu(hardware: HardwareConfig, runtime: Runtime) -> bool:
    """Return whether a user's runtime class computes on the CPU, as one may while the device is not at hand."""
    return hardware._target_ is not None and runtime.device(0).type == "cpu"


def check_device_count(runtime: Runtime, topology: TopologyConfig) -> None:
    """Check that this node has enough devices for the topology.

    Raises:
        InputError: if there are fewer.
    """
    if runtime.device_count() < topology.devices_per_node:
        raise InputError(
            f"topology={topology.name} needs {topology.devices_per_node} devices per node; "
            f"runtime {runtime.name} finds {runtime.device_count()}"
        )


def _pattern_matches(file: str, pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise InputError(
            f"{hardware_file(file)}: device_name_pattern={pattern}: not a regular expression ({error}); "
            "escape special characters with a backslash"
        ) from error


def validate_devices(hardware: HardwareConfig, runtime: Runtime, devices: int, folder: Path) -> List[str]:
    """Compare the device names with the hardware file, because another device's peak gives a wrong mfu.

    Args:
        hardware: the selected hardware file.
        runtime: queried for names and memory.
        devices: number of devices of this node in use.
        folder: conf/hardware/, which may contain a better file.

    Returns:
        Warnings.

    Raises:
        InputError: if a device does not match the file.
    """
    warnings, pattern = [], hardware.device_name_pattern
    known = read_hardware_files(folder)
    vendors = {str(entry.get("vendor") or "") for entry in known.values()} - {""}
    patterns = {name: str(entry.get("device_name_pattern") or "") for name, entry in known.items()}
    for index in range(devices):
        name = runtime.device_name(index)
        if runtime.simulated or not name:
            continue
        if is_mig_slice(name) and hardware.name in known and hardware.product_name:
            raise InputError(
                f"hardware={hardware.name}, but device {index} is a MIG slice, {name!r}, with only a part of the "
                "speed and memory; use hardware=cuda, or your own hardware file (no peak, hence no mfu)"
            )
        better = [
            file
            for file, file_pattern in patterns.items()
            if file_pattern and _pattern_matches(file, file_pattern, name)
        ]
        other_vendor = any(vendor.lower() in name.lower() for vendor in vendors - {hardware.vendor})
        fits, advice = True, f"use hardware={better[0]}" if better else ""
        if pattern:
            fits = _pattern_matches(hardware.name, pattern, name)
            advice = advice or "use hardware=cuda (any device, no peak)"
            if hardware._target_ is not None:
                advice = "correct its device_name_pattern, or Runtime.device_name"
        elif hardware.product_name:
            fits = not other_vendor and better[:1] in ([], [hardware.name])
            advice = advice or "use the file of that device, or write one (docs/new_chip.md)"
        if not fits:
            raise InputError(f"hardware={hardware.name}, but device {index} is {name!r}; {advice}")
        total = runtime.total_memory(index)
        if hardware.memory_gib and total and abs(total / 2**30 / hardware.memory_gib - 1) > 0.1:
            warnings.append(
                f"device {index} has {total / 2**30:.1f} GiB ({total:.0f} bytes by its runtime), "
                f"{hardware_file(hardware.name)} has {hardware.memory_gib:g}; using the device's value"
            )
        if not pattern and better and index == 0:
            warnings.append(f"{name}: hardware={better[0]} has its peak; hardware={hardware.name} gives no mfu")
        elif not pattern and hardware.product_name and hardware.product_name not in name and index == 0:
            warnings.append(
                f"device 0 is {name!r}; hardware={hardware.name} has the specification of {hardware.product_name}"
            )
    return warnings
