"""Whether a run was alone on its machine: what others take of the processors, and other processes on its cards."""

import os
import time
from typing import Any, Optional

import psutil

from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.runs.result import CONTENTION_THRESHOLD

_EVERY_S = 5.0
_SHORT_S = 2.0  # the kernel counts in hundredths of a second, and a process that ends is counted late


def cpu_busy_seconds() -> float:
    """Seconds that all processors have spent on anything so far, time stolen by a hypervisor's other guests too."""
    times = psutil.cpu_times()
    parts = ("user", "nice", "system", "irq", "softirq", "steal")  # guests' time is within user
    return float(sum(getattr(times, part, 0.0) for part in parts))


class ContentionMonitor:
    """Looks at this node while training goes on; on one rank of it."""

    def __init__(self, runtime: Runtime, devices: int) -> None:
        """Describe the node.

        Args:
            runtime: asked for processes on the cards.
            devices: ranks on this node: their launcher's processes are not others.
        """
        self._runtime, self._devices = runtime, devices
        root = psutil.Process()
        self._root = root if devices == 1 else root.parent() or root
        self._mark = (time.monotonic(), 0.0, 0.0)
        self._said = False
        self._next = 0.0
        self.external_cpu_load: Optional[float] = None
        """Share of the machine's processors that others have taken in training, as last looked; None: not known yet."""
        self.external_device_processes: Optional[int] = None
        """Other processes seen on the cards at most; None: nothing says it."""

    def begin(self) -> None:
        """Training is about to begin."""
        self._mark = (time.monotonic(), cpu_busy_seconds(), self._own())
        self._next = time.monotonic() + _EVERY_S

    def sample_if_due(self) -> Optional[str]:
        """`look` when it is time: finding a job's processes reads all of the machine's."""
        return self.sample() if time.monotonic() >= self._next else None

    def sample(self) -> Optional[str]:
        """See what others take; a line to say, once, when that is a tenth of the machine, or cards are shared."""
        self._next = time.monotonic() + _EVERY_S
        since, busy, own = self._mark
        elapsed = time.monotonic() - since
        if busy and elapsed >= _SHORT_S:
            taken = (cpu_busy_seconds() - busy) - (self._own() - own)
            self.external_cpu_load = min(1.0, max(0.0, taken / (elapsed * (os.cpu_count() or 1))))
        for index in range(self._devices):
            there = self._runtime.num_processes(index)
            if there is not None:  # a rank of ours is one of them; in a container its number would be another
                self.external_device_processes = max(self.external_device_processes or 0, there - 1)
        much = self.external_cpu_load is not None and self.external_cpu_load > CONTENTION_THRESHOLD
        if self._said or not (much or self.external_device_processes):
            return None
        self._said = True
        what = [f"others take {self.external_cpu_load:.0%} of this machine's processors"] if much else []
        what += (
            [f"{self.external_device_processes} other processes are on its cards"]
            if self.external_device_processes
            else []
        )
        return f"not alone: {', '.join(what)}; figures measured beside others are not comparable (rows are marked)"

    def _own(self) -> float:
        """Processor seconds of this job's processes on the node so far."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.Error:  # ended meanwhile; its parent's account has it
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _tree(self) -> Any:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return [psutil.Process()]
