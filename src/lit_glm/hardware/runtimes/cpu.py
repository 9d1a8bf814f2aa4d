"""The CPU: every rank is a process on the same machine."""

import ctypes
import os
import resource
import time
from typing import List, Optional

import psutil
import torch

from lit_glm.hardware.monitors import cpu_info, cpu_name
from lit_glm.hardware.runtimes import cpu_ops
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.runtime_ops import RuntimeOps

_CHILD_SEARCH_INTERVAL_S = (1.0, 10.0)
"""Bounds of the interval between two searches for child processes; within them, the age of this process."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGEST_KEPT = 256 * 2**20


class CPURuntime(Runtime):
    """CPU runtime: ranks share the cores; memory in use is the resident memory of the processes."""

    name = "cpu"
    shares_memory = True

    def __init__(self) -> None:
        self._children: List[psutil.Process] = []
        self._childrens_peak, self._start_time, self._next_reading = 0.0, time.monotonic(), 0.0
        retain_freed_memory()
        # If one candidate is nearly certain, gradients are below 1e-38 (denormal), and their products take up to thirty
        # times as long. Threads that are started later inherit the setting.
        torch.set_flush_denormal(True)

    def device_count(self) -> int:
        """Return the number of available cores, the largest number of ranks."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def device(self, index: int) -> torch.device:
        """Return the CPU, which all ranks share."""
        return torch.device("cpu")

    def device_name(self, index: int) -> str:
        return cpu_name()

    def precision_hint(self, name: str) -> str:
        """Return a hint if the CPU lacks instructions for a half precision, which is then computed in fp32."""
        if name == "bf16" and not accumulates_bf16_in_fp32():
            return "this torch accumulates bf16 products in bf16 on this CPU: inexact and slow; use torch 2 or fp32"
        if name == "bf16" and not bf16_instructions():
            return "this CPU has no bf16 units: torch converts and computes in fp32, slower than precision=fp32"
        if name in ("amp", "fp16"):
            return "CPUs have few fp16 instructions: expect it to be slower than precision=fp32"
        return ""

    def model_ops(self) -> RuntimeOps:
        """Return the operations that a CPU computes in its own way."""
        return RuntimeOps(
            cpu_ops.linear,
            cpu_ops.dropout,
            cpu_ops.sample_zero_positions,
            self.checkpoint(),
            cpu_ops.PADDED_GROUP,
            cpu_ops.ATTENTION_SCORES,
            cpu_ops.TRAINING_LOGITS,
            cpu_ops.READ_LOGITS,
        )

    def peak_memory(self, index: int) -> Optional[float]:
        """Return the peak resident memory of this process and its children (data loaders), from the kernel's counters.

        Pages that a data loader shares with this process are counted for both.
        """
        # getrusage is only the fallback: its maximum includes memory of the parent program before exec.
        own_peak = _peak_rss(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        theirs = sum(_peak_rss(process.pid) for process in self._child_processes() if process.is_running())
        self._childrens_peak = max(self._childrens_peak, theirs)
        return own_peak + self._childrens_peak

    def _child_processes(self) -> List[psutil.Process]:
        """Return this process's children; rarely searched, because that reads all processes of the machine."""
        now = time.monotonic()
        if now >= self._next_reading:
            self._next_reading = now + min(
                max(_CHILD_SEARCH_INTERVAL_S[0], now - self._start_time), _CHILD_SEARCH_INTERVAL_S[1]
            )
            self._children = psutil.Process().children(recursive=True)
        return self._children

    def memory_in_use(self, index: int) -> Optional[float]:
        """Return the resident memory of this process and its children."""
        total = 0.0
        for process in (psutil.Process(), *self._child_processes()):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # a data loader that has ended meanwhile
                continue
        return total

    def total_memory(self, index: int) -> Optional[float]:
        """Return the memory of the machine."""
        return float(psutil.virtual_memory().total)


def retain_freed_memory() -> None:
    """Make the C library keep freed memory, because the next step needs it again (glibc's mallopt, malloc.h).

    Otherwise each tensor above 32 MiB is mapped and unmapped at each use, and the kernel clears its pages each time: at
    GLM-Large, bs 8, a fifth of a training step (benchmarks/). Tensors above 256 MiB are still returned: fragmentation
    would cost more memory than the rest of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    if not mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT):  # glibc before 2.35 has no threshold above 32 MiB
        mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def bf16_instructions() -> List[str]:
    """List the instruction sets of this CPU that multiply in bf16; empty without any."""
    known = {"amx_bf16": "AMX tiles", "avx512_bf16": "AVX-512 dot products", "bf16": "Arm dot products"}
    flags = cpu_info("flags", "Features").split()
    return [text for flag, text in known.items() if flag in flags]


def accumulates_bf16_in_fp32() -> bool:
    """Return whether bf16 products are accumulated in fp32; torch 1.12 does so only with AVX-512.

    Accumulated in bf16, 512 ones give 256, because the next number in bf16 is 258.
    """
    ones = torch.ones(2, 512, dtype=torch.bfloat16)
    return bool((ones @ ones.t() == 512).all())


def _peak_rss(pid: int) -> float:
    """Return the peak resident memory of a process, bytes; 0 if it has exited or the kernel does not report it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0
