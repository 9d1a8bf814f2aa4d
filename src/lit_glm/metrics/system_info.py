"""environment.json: what the figures were measured on. Never a secret: variables come from a list of known names."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional

import psutil
import torch
from omegaconf import OmegaConf

import lit_glm
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.config.schema import TrainConfig
from lit_glm.config.secrets import is_secret, mask_override
from lit_glm.hardware.monitors import cpu_name
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.vendor_packages import PACKAGES, VARIABLES
from lit_glm.openmp import SPIN_LIMITS, THREAD_COUNT_VARIABLES, available_cores

_PACKAGES = (
    "torch",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "h5py",
    "tokenizers",
    "safetensors",
    *PACKAGES,
)
_VARIABLES = (
    *VARIABLES,
    *THREAD_COUNT_VARIABLES,
    *SPIN_LIMITS,
    "OMP_WAIT_POLICY",
    "GLOO_SOCKET_IFNAME",
)


def _command_output(*command: str, folder: Optional[Path] = None) -> Optional[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _os_name() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        return next(line.split("=", 1)[1].strip('"') for line in lines if line.startswith("PRETTY_NAME="))
    except (OSError, StopIteration):
        return platform.platform()


def _package_versions() -> Dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read_text_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _machine_model() -> Optional[str]:
    """Maker and model as the firmware gives them (DMI); None where the kernel does not show them."""
    name = " ".join(
        filter(None, (_read_text_file(f"/sys/class/dmi/id/{key}") for key in ("sys_vendor", "product_name")))
    )
    return name or None


def _fastest_network_port() -> Optional[str]:
    """Kind and rate of the fastest InfiniBand or RoCE port, as the kernel gives them; None without one."""
    ports = []
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        rate = re.match(r"([\d.]+) Gb/sec", _read_text_file(f"{port}/rate"))
        if rate:
            ports.append((float(rate.group(1)), _read_text_file(f"{port}/link_layer") or "InfiniBand"))
    return "{1}, {0:g} Gb/s".format(*max(ports)) if ports else None


def describe_machine() -> str:
    """This machine in one line."""
    name = f"{_machine_model()}, " if _machine_model() else ""
    size = f"{os.cpu_count()} cores of {cpu_name()}, {psutil.virtual_memory().total / 2**30:.1f} GiB"
    return f"{platform.node()}: {name}{size}, {_os_name()}, kernel {platform.release()}"


def _container_image() -> Optional[str]:
    """Container image as the container's maker has left it; "" outside a container, None where nothing says."""
    named = os.environ.get("LIT_GLM_CONTAINER_IMAGE")
    if named:
        return named
    marks = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container", "/.singularity.d")
    inside = any(Path(mark).exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ
    inside = inside or any(word in _read_text_file("/proc/1/cgroup") for word in ("docker", "kubepods", "containerd"))
    return None if inside else ""


def describe_system(config: TrainConfig, runtime: Runtime, command: List[str]) -> Dict[str, Any]:
    """Ask the system what it is; `report.*` wins, the hardware file fills what nothing else knows.

    Args:
        config: the run's.
        runtime: asked for cards and driver.
        command: the command line of the run.
    """
    hardware, told = config.hardware, config.report
    source = Path(lit_glm.__file__).resolve().parent
    commit = _command_output("git", "rev-parse", "HEAD", folder=source)
    changed = _command_output("git", "status", "--porcelain", "--untracked-files=no", folder=source) if commit else None
    cards = [runtime.device_name(index) for index in range(config.topology.devices_per_node)]
    of_file = "" if runtime.simulated else hardware.server  # a rehearsal says nothing of the chip's server
    return {
        "lit_glm": lit_glm.__version__,
        "git_commit": commit,
        "git_dirty": bool(changed) if commit else None,
        "command": [mask_override(argument) for argument in command],
        "host": platform.node(),
        "pid": os.getpid(),
        "machine": told.machine or _machine_model() or of_file or None,
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _package_versions(),
        "libraries": runtime.library_versions(),
        "container_image": told.image if told.image is not None else _container_image(),
        "driver": told.driver or runtime.driver_version(),
        "has_driver": runtime.has_driver or runtime.simulated,
        "device_name": told.device_name or hardware.product_name or (cards[0] if cards else ""),
        "devices": [name or hardware.product_name for name in cards],
        "runtime": runtime.name,
        "simulated": runtime.simulated,
        "server": hardware.server,
        "network": told.network or _fastest_network_port() or ("" if runtime.simulated else hardware.network) or None,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "variables": {name: os.environ[name] for name in _known_variables() if name in os.environ},
    }


def _known_variables() -> List[str]:
    """Names from our own list and from the hardware files, never from the command line; none of a secret."""
    files: List[Any] = [OmegaConf.load(path) for path in sorted((CONF_DIR / "hardware").glob("*.yaml"))]
    names = [*_VARIABLES, *(str(name) for content in files for name in content.get("env") or {})]
    return [name for name in dict.fromkeys(names) if not is_secret(name)]
