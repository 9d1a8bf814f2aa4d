"""environment.json: what the figures were measured on. Never a secret: variables come from a list of known names."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional

import psutil

import lit_glm
from lit_glm.config.schema import HardwareConfig
from lit_glm.hardware.runtimes.base import Runtime

_PACKAGES = (
    "torch",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "h5py",
    "scipy",
    "tokenizers",
    "safetensors",
    "xmlir",
    "xacc",
    "torch-xmlir",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "XPU_VISIBLE_DEVICES",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "CUDART_DUMMY_REGISTER",
)


def _output(*command: str, folder: Optional[Path] = None) -> Optional[str]:
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


def _versions() -> Dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(hardware: HardwareConfig, runtime: Runtime, devices: int, command: List[str]) -> Dict[str, Any]:
    """Ask the system what it is.

    Args:
        hardware: names of the variables that the hardware file sets, and its server and network.
        runtime: asked for the cards.
        devices: cards of this node in use.
        command: the command line of the run.
    """
    source = Path(lit_glm.__file__).resolve().parent
    commit = _output("git", "rev-parse", "HEAD", folder=source)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", folder=source) if commit else None
    return {
        "lit_glm": lit_glm.__version__,
        "git_commit": commit,
        "git_dirty": bool(changed) if commit else None,
        "command": command,
        "host": platform.node(),
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": _versions(),
        "container_image": os.environ.get("LIT_GLM_CONTAINER_IMAGE"),
        "driver": None if runtime.simulated else _driver(),
        "cards": [runtime.device_name(index) or hardware.card for index in range(devices)],
        "runtime": runtime.name,
        "simulated": runtime.simulated,
        "server": hardware.server,
        "network": hardware.network,
        "cpu_count": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "variables": {name: os.environ[name] for name in (*_VARIABLES, *hardware.env) if name in os.environ},
    }


def _driver() -> Optional[str]:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
