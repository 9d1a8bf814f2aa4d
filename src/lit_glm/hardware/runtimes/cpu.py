"""The processor: every rank is a process on the same machine."""

import os
import resource
from typing import Optional

import psutil
import torch

from lit_glm.hardware.runtimes.base import Runtime


class CPURuntime(Runtime):
    """Ranks share the cores; memory in use is the resident memory of the processes."""

    name = "cpu"
    shares_memory = True
    _children = 0.0

    def device_count(self) -> int:
        """As many ranks as there are cores."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def device(self, index: int) -> torch.device:
        """All ranks compute on the same device."""
        return torch.device("cpu")

    def device_name(self, index: int) -> str:
        """Model name as the kernel reports it."""
        return cpu_name()

    def peak_memory(self, index: int) -> Optional[float]:
        """Resident memory of this process and its children (data loaders): the kernel's high-water mark of each.

        A data loader's pages that it shares with this process are counted there as well.
        """
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB
        children = sum(_high_water(process.pid) for process in psutil.Process().children(recursive=True))
        self._children = max(self._children, children)
        return own + self._children

    def memory_now(self, index: int) -> Optional[float]:
        """Resident memory of this process and its children."""
        process = psutil.Process()
        total = 0.0
        for one in (process, *process.children(recursive=True)):
            try:
                total += one.memory_info().rss
            except psutil.Error:  # a data loader that has ended meanwhile
                continue
        return total

    def total_memory(self, index: int) -> Optional[float]:
        """Memory of the machine."""
        return float(psutil.virtual_memory().total)


def cpu_name() -> str:
    """Model name of the processor as the kernel reports it; "" where it does not."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return ""


def _high_water(pid: int) -> float:
    """Largest resident memory of a process so far, bytes; 0 if it has ended or the kernel does not say."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0
