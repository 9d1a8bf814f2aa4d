"""The runtimes that exist, and the choice between them."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

from omegaconf import OmegaConf

from lit_glm.config.schema import HardwareConfig, TopologyConfig
from lit_glm.errors import InputError
from lit_glm.hardware.env import set_environment
from lit_glm.hardware.runtimes.base import Runtime

RUNTIMES = ("cpu", "cuda", "xmlir", "xpytorch")
"""That a chip may run on; `simulated` rehearses any."""
OUTSIDE = "_target_"
"""The runtime of a hardware file that names a class of another package."""


def named_class(target: str) -> "type[Runtime]":
    """A runtime of a package outside this one.

    Args:
        target: package.module.Class, as `_target_` of a hardware file has it.

    Raises:
        InputError: if there is no such class, or if it is no Runtime.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"hardware._target_={target}: cannot be found ({error}); it is package.module.Class, and the package "
            f"must be installed in this environment ({sys.executable})"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Runtime)):
        raise InputError(
            f"hardware._target_={target}: is no subclass of lit_glm.hardware.runtimes.base.Runtime (docs/new_chip.md)"
        )
    return found


def _classes(hardware: HardwareConfig) -> Dict[str, "type[Runtime]"]:
    from lit_glm.hardware.runtimes.cpu import CPURuntime
    from lit_glm.hardware.runtimes.cuda import CUDARuntime
    from lit_glm.hardware.runtimes.kunlunxin import XMLIRRuntime, XPyTorchRuntime
    from lit_glm.hardware.runtimes.simulated import SimulatedRuntime

    own = {} if hardware._target_ is None else {OUTSIDE: named_class(hardware._target_)}
    return {
        **own,
        "cpu": CPURuntime,
        "cuda": CUDARuntime,
        "xmlir": XMLIRRuntime,
        "xpytorch": XPyTorchRuntime,
        "simulated": SimulatedRuntime,
    }


def _wanted(hardware: HardwareConfig) -> List[str]:
    """Runtimes that may be taken, best first: none that would give another chip's figures under this one's name."""
    if hardware._target_ is not None:
        return ["simulated"] if hardware.runtime == "simulated" else [OUTSIDE]
    unknown = sorted(set(hardware.runtimes) - set(RUNTIMES))
    if unknown or not (hardware.runtimes or hardware.runtime == "simulated"):
        raise InputError(
            f"hardware.runtimes=[{', '.join(hardware.runtimes)}] (conf/hardware/{hardware.name}.yaml): one or more of "
            f"{', '.join(RUNTIMES)}"
        )
    if hardware.card and "cpu" in hardware.runtimes:
        raise InputError(
            f"hardware.runtimes={hardware.runtimes}: a processor's figures would stand under {hardware.card}'s name; "
            "rehearse with hardware.runtime=simulated"
        )
    if hardware.runtime == "auto":
        return list(hardware.runtimes)
    if hardware.runtime not in ("simulated", *hardware.runtimes):
        raise InputError(
            f"hardware.runtime={hardware.runtime}: hardware={hardware.name} runs on {', '.join(hardware.runtimes)} "
            "(auto takes the first that is there), or is rehearsed with hardware.runtime=simulated"
        )
    return [hardware.runtime]


def check_runtime(hardware: HardwareConfig, topology: TopologyConfig) -> None:
    """Say that a chip's runtime is missing before anything is started; the processor's never is.

    Raises:
        InputError: what is missing, and how to rehearse without it; or why it cannot span these nodes.
    """
    names = _wanted(hardware)
    if {"cpu", "simulated"} & set(names):
        return  # without importing torch
    classes = _classes(hardware)
    reasons = [(name, classes[name].missing()) for name in names]
    there = [name for name, reason in reasons if reason is None]
    if not there:
        raise InputError(_unusable(hardware, [f"  {name}: {reason}" for name, reason in reasons]))
    unable = classes[there[0]].cannot_span(topology.num_nodes)
    if unable is not None:
        raise InputError(f"topology={topology.name}: {unable}")


def _unusable(hardware: HardwareConfig, reasons: List[str]) -> str:
    ways = dict.fromkeys(_classes(hardware)[name].install for name in _wanted(hardware))
    return (
        f"hardware={hardware.name}: none of its runtimes can be used here\n"
        + "\n".join(reasons)
        + "".join(f"\nInstall it: {way}" for way in ways if way)
        + "\nor rehearse without the chip: "
        f"hardware={hardware.name} hardware.runtime=simulated"
    )


def make_runtime(hardware: HardwareConfig, topology: TopologyConfig) -> Runtime:
    """Make the runtime that a hardware file asks for.

    Raises:
        InputError: if it is not there; says what is missing and how to rehearse without it.
    """
    from lit_glm.hardware.runtimes.simulated import SimulatedRuntime

    set_environment(hardware)
    classes = _classes(hardware)
    names = _wanted(hardware)
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


def check_devices(runtime: Runtime, topology: TopologyConfig) -> None:
    """Compare the devices of this node with the topology.

    Raises:
        InputError: if there are fewer.
    """
    if runtime.device_count() < topology.devices_per_node:
        raise InputError(
            f"topology={topology.name} asks for {topology.devices_per_node} devices a node; "
            f"{runtime.name} sees {runtime.device_count()} here"
        )


def _matches(file: str, pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise InputError(
            f"conf/hardware/{file}.yaml: detect={pattern}: not a regular expression ({error}); "
            "brackets and the like need a backslash before them"
        ) from error


def check_cards(hardware: HardwareConfig, runtime: Runtime, devices: int, folder: Path) -> List[str]:
    """Compare what the cards call themselves with the hardware file: another card's peak makes a wrong mfu.

    Args:
        hardware: the file that was chosen.
        runtime: asked for names and memory.
        devices: cards of this node in use.
        folder: conf/hardware/, where a better file may be.

    Returns:
        Lines worth reading.

    Raises:
        InputError: if a card is another than the file's.
    """
    said = []
    known: Dict[str, Any] = {entry.stem: OmegaConf.load(entry) for entry in sorted(folder.glob("*.yaml"))}
    vendors = {str(entry.get("vendor") or "") for entry in known.values()} - {""}
    patterns = {name: str(entry.get("detect") or "") for name, entry in known.items()}
    for index in range(devices):
        name = runtime.device_name(index)
        if runtime.simulated or not name:
            continue
        better = [file for file, pattern in patterns.items() if pattern and _matches(file, pattern, name)]
        if hardware.detect and not _matches(hardware.name, hardware.detect, name):
            raise InputError(
                f"hardware={hardware.name}, but card {index} calls itself {name!r}; "
                f"take hardware={better[0] if better else 'cuda (any card, no peak)'}"
            )
        others = [vendor for vendor in vendors - {hardware.vendor} if vendor.lower() in name.lower()]
        if not hardware.detect and hardware.card and ((better and better[0] != hardware.name) or others):
            take = better[0] if better else "another file, or one of its own (docs/hardware.md)"
            raise InputError(f"hardware={hardware.name}, but card {index} calls itself {name!r}; take hardware={take}")
        total = runtime.total_memory(index)
        if hardware.memory_gib and total and abs(total / 2**30 / hardware.memory_gib - 1) > 0.1:
            said.append(
                f"card {index} has {total / 2**30:.1f} GiB, conf/hardware/{hardware.name}.yaml says "
                f"{hardware.memory_gib:g}: the card's own figure counts"
            )
        if not hardware.detect and better and index == 0:
            said.append(f"{name}: hardware={better[0]} knows its peak, hardware={hardware.name} gives no mfu")
        elif not hardware.detect and hardware.card and hardware.card not in name and index == 0:
            said.append(f"card 0 calls itself {name!r}; hardware={hardware.name} has the figures of {hardware.card}")
    return said
