"""Description of host, devices and software (environment.json), and contention by other processes.

Never a secret: variables come from a list of known names.
"""

import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import psutil
import torch

import lit_glm
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.config.schema import TrainConfig
from lit_glm.config.secrets import is_secret, mask_override
from lit_glm.hardware.env import PACKAGES, VARIABLES, read_hardware_files
from lit_glm.hardware.monitors import command_output, cpu_name, read_system_file
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.openmp import SPIN_LIMITS, THREAD_COUNT_VARIABLES, available_cores
from lit_glm.runs.environment import installed_versions
from lit_glm.runs.result import CONTENTION_THRESHOLD

_PACKAGES = (
    *"torch pytorch-lightning torchmetrics hydra-core omegaconf numpy h5py tokenizers safetensors".split(),
    *PACKAGES,
)
_VARIABLES = (*VARIABLES, *THREAD_COUNT_VARIABLES, *SPIN_LIMITS, "OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME")


def _os_name() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        return next(line.split("=", 1)[1].strip('"') for line in lines if line.startswith("PRETTY_NAME="))
    except (OSError, StopIteration):
        return platform.platform()


def _machine_model() -> Optional[str]:
    """Return vendor and model from the firmware (DMI); None if the kernel does not show them."""
    names = [read_system_file(f"/sys/class/dmi/id/{key}") for key in ("sys_vendor", "product_name")]
    return " ".join(filter(None, names)) or None


def _fastest_network_port() -> Optional[str]:
    """Return type and rate of the fastest InfiniBand or RoCE port according to the kernel; None without one."""
    ports = []
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        rate = re.match(r"([\d.]+) Gb/sec", read_system_file(f"{port}/rate"))
        if rate:
            ports.append((float(rate.group(1)), read_system_file(f"{port}/link_layer") or "InfiniBand"))
    return "{1}, {0:g} Gb/s".format(*max(ports)) if ports else None


def describe_machine() -> str:
    """Describe this machine in one line."""
    name = f"{_machine_model()}, " if _machine_model() else ""
    size = f"{os.cpu_count()} cores of {cpu_name()}, {psutil.virtual_memory().total / 2**30:.1f} GiB"
    return f"{platform.node()}: {name}{size}, {_os_name()}, kernel {platform.release()}"


def _container_image() -> Optional[str]:
    """Return the image in LIT_GLM_CONTAINER_IMAGE; without it, "" outside a container and None inside one."""
    image = os.environ.get("LIT_GLM_CONTAINER_IMAGE")
    if image:
        return image
    marks = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container", "/.singularity.d")
    inside = any(Path(mark).exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ
    inside = inside or any(word in read_system_file("/proc/1/cgroup") for word in ("docker", "kubepods", "containerd"))
    return None if inside else ""


def source_commit(folder: Path) -> Tuple[Optional[str], Optional[bool]]:
    """Return the commit of the package's checkout, and whether its files have changed since; (None, None) without one.

    A package that is installed in an environment below another project's repository is not part of that repository.
    """
    git = ("git", "-C", str(folder))
    commit = command_output(*git, "rev-parse", "HEAD")
    if not commit or not command_output(*git, "ls-files", "__init__.py"):
        return None, None
    return commit, command_output(*git, "status", "--porcelain", "--untracked-files=no") != ""


def describe_system(config: TrainConfig, runtime: Runtime, command: List[str]) -> Dict[str, Any]:
    """Describe the system; `report.*` takes precedence, the hardware file fills in what cannot be detected."""
    hardware, overrides = config.hardware, config.report
    commit, is_changed = source_commit(Path(lit_glm.__file__).resolve().parent)
    device_names = [runtime.device_name(index) for index in range(config.topology.devices_per_node)]
    # A dry run does not run on that server.
    from_file, network_from_file = ("", "") if runtime.simulated else (hardware.server, hardware.network)
    return {
        "lit_glm": lit_glm.__version__,
        "git_commit": commit,
        "git_dirty": is_changed,
        "command": [mask_override(argument) for argument in command],
        "host": platform.node(),
        "pid": os.getpid(),
        "machine": overrides.machine or _machine_model() or from_file or None,
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": installed_versions(_PACKAGES),
        "libraries": runtime.library_versions(),
        "container_image": overrides.image if overrides.image is not None else _container_image(),
        "driver": overrides.driver or runtime.driver_version(),
        "has_driver": runtime.has_driver or runtime.simulated,
        "device_name": overrides.device_name or hardware.product_name or (device_names[0] if device_names else ""),
        "devices": [name or hardware.product_name for name in device_names],
        "runtime": runtime.name,
        "simulated": runtime.simulated,
        "server": hardware.server,
        "network": overrides.network or _fastest_network_port() or network_from_file or None,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "variables": {name: os.environ[name] for name in _known_variables(hardware.env) if name in os.environ},
    }


def _known_variables(chosen: Iterable[str]) -> List[str]:
    """List variable names from this module and the hardware files, `chosen` those of the chosen file; no secrets."""
    files = read_hardware_files(CONF_DIR / "hardware").values()
    names = [*_VARIABLES, *(str(name) for content in files for name in content.get("env") or {}), *chosen]
    return [name for name in dict.fromkeys(names) if not is_secret(name)]


_EVERY_S = 5.0
_SHORT_S = 2.0  # minimum interval: the kernel counts in 1/100 s, and an exited process is counted late


def cpu_busy_seconds() -> float:
    """Return the busy seconds of all CPUs so far, including time stolen by a hypervisor's other guests."""
    times = psutil.cpu_times()
    parts = ("user", "nice", "system", "irq", "softirq", "steal")  # guest time is included in user
    return float(sum(getattr(times, part, 0.0) for part in parts))


class ContentionMonitor:
    """Sampler of the load of other processes on this node, from its creation on; used on rank 0 only."""

    def __init__(self, runtime: Runtime, devices: int) -> None:
        """Find the processes of this job.

        Args:
            runtime: queried for the processes on the devices.
            devices: number of ranks on this node; processes of their launcher count as ours.
        """
        self._runtime, self._devices = runtime, devices
        root = psutil.Process()
        self._root = root if devices == 1 else root.parent() or root
        self._start = (time.monotonic(), cpu_busy_seconds(), self._tree_cpu_seconds())
        self._has_warned = False
        self._next = time.monotonic() + _EVERY_S
        self.external_cpu_load: Optional[float] = None
        """Share of the machine's CPUs used by others during training, at the last sample; None: not yet known."""
        self.external_device_processes: Optional[int] = None
        """Largest number of other processes seen on a device; None: not reported by the runtime."""

    def sample_if_due(self) -> Optional[str]:
        """Call `sample` when due; it lists all processes of the machine to find those of this job."""
        return self.sample() if time.monotonic() >= self._next else None

    def sample(self) -> Optional[str]:
        """Sample the load; return a warning, once, if it exceeds `CONTENTION_THRESHOLD` or devices are shared."""
        self._next = time.monotonic() + _EVERY_S
        since, busy, own_before = self._start
        elapsed = time.monotonic() - since
        if elapsed >= _SHORT_S:
            taken = (cpu_busy_seconds() - busy) - (self._tree_cpu_seconds() - own_before)
            self.external_cpu_load = min(1.0, max(0.0, taken / (elapsed * (os.cpu_count() or 1))))
        for index in range(self._devices):
            num_processes = self._runtime.num_processes(index)
            if num_processes is not None:  # one of them is our rank, whose PID may differ in a container
                self.external_device_processes = max(self.external_device_processes or 0, num_processes - 1)
        is_high = self.external_cpu_load is not None and self.external_cpu_load > CONTENTION_THRESHOLD
        if self._has_warned or not (is_high or self.external_device_processes):
            return None
        self._has_warned = True
        causes = [f"other processes use {self.external_cpu_load:.0%} of the CPUs"] if is_high else []
        if self.external_device_processes:
            causes.append(f"{self.external_device_processes} other processes are on the same device")
        return f"contention: {', '.join(causes)}; measurements are not comparable (rows are marked)"

    def _tree_cpu_seconds(self) -> float:
        """Return the CPU seconds of this job's processes on the node so far."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.Error:  # exited meanwhile: included in its parent's children_* times
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _tree(self) -> Any:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return [psutil.Process()]
