"""Interface of a runtime: the only interface between this project and any vendor's software."""

from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional

import torch
import torch.utils.checkpoint
from torch import Tensor

from lit_glm.config.schema import LossScaleConfig
from lit_glm.hardware.device_monitor import MonitoredMemory, monitor_of_name
from lit_glm.hardware.monitors import MONITORS
from lit_glm.model.runtime_ops import RuntimeOps


class Runtime:
    """Devices of one kind. Subclasses override what the vendor supports; the defaults return None or do nothing.

    `unavailable_reason` is called on the class; only the constructor imports the vendor's package.
    """

    name = ""
    has_driver = False
    """Whether its devices have a driver of their own, unlike a CPU."""
    simulated = False
    """Whether its devices are simulated: metrics are then not measurements of the device."""
    shares_memory = False
    """Whether the devices of a node share one memory: `mem` is then the sum over its ranks."""
    has_tf32 = False
    """Whether fp32 products can be rounded to TF32."""
    pins_memory = False
    """Whether copies to the device go through page-locked memory."""
    backend = "gloo"
    """Collective backend for torch.distributed."""

    install_hint = ""
    """How to install the software that it needs."""
    monitor = ""
    """package.module.NAME of a `lit_glm.hardware.monitors.Monitor`, in a module without torch imports; "": none."""
    _monitored: Optional[MonitoredMemory] = None

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        """Return why this runtime cannot be used here; None if it can. Must not import the vendor's package."""
        return None

    @staticmethod
    def multi_node_unsupported_reason(nodes: int) -> Optional[str]:
        """Return why the vendor's collectives cannot span this many nodes; None if they can."""
        return None

    def device_count(self) -> int:
        """Return the number of devices visible to this process."""
        raise NotImplementedError(f"{type(self).__name__} has no method device_count (docs/new_chip.md)")

    def device(self, index: int) -> torch.device:
        """Return the torch device of an index."""
        raise NotImplementedError(f"{type(self).__name__} has no method device (docs/new_chip.md)")

    def set_device(self, index: int) -> None:
        """Make a device the current one of this process."""

    def synchronize(self) -> None:
        """Wait until the current device has completed all work."""

    def to_host_async(self, values: Tensor, pending: Optional[Any] = None) -> Callable[[], List[Any]]:
        """Start an asynchronous copy of a small tensor to the host.

        Args:
            values: [N], must not change until the copy has been read.
            pending: a collective that still writes `values` (what `async_op=True` returns).

        Returns:
            Function that waits for the numbers and returns them. By default it copies only when called, after all work
            that the device has received by then; a runtime with streams waits only for the numbers.
        """

        def read() -> List[Any]:
            if pending is not None:
                pending.wait()
            return values.tolist()

        return read

    def after_step(self) -> None:
        """Run what the vendor requires after every step, such as a barrier of a lazy runtime. Nothing by default."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generators of the CPU and of the current device.

        Called at every step: `torch.manual_seed` would record a stack trace for each device type that is not available.
        """
        torch.default_generator.manual_seed(seed)

    def checkpoint(self) -> Callable[..., Any]:
        """Return `fn(f, *args)` that recomputes f in the backward pass."""
        return partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def model_ops(self) -> RuntimeOps:
        """Return the operations of the model that this runtime replaces."""
        return RuntimeOps(checkpoint=self.checkpoint())

    def autocast(self, dtype: torch.dtype) -> ContextManager[Any]:
        """Return a context in which matrix products are computed in a half precision."""
        return torch.autocast(self.device(0).type, dtype=dtype)

    def loss_scaler(self, config: LossScaleConfig) -> Optional[Any]:
        """Return the vendor's own loss scaler for mixed fp16, with the interface of torch's GradScaler; None: ours."""
        return None

    def allow_tf32(self, allowed: bool) -> None:
        """Let fp32 products round their inputs to TF32 (10 bits of mantissa), if the device supports it."""

    def precision_hint(self, name: str) -> str:
        """Return a hint about a precision on this runtime; "" without one."""
        return ""

    def device_name(self, index: int) -> str:
        """Return the name that the device reports."""
        return ""

    def driver_version(self) -> Optional[str]:
        """Return the driver version; None if unknown."""
        return None

    def library_versions(self) -> Dict[str, str]:
        """Versions of the vendor's libraries that torch uses, by name; empty where there are none to report."""
        return {}

    def num_processes(self, index: int) -> Optional[int]:
        """Return the number of processes that compute on a device, including this one; None if unknown."""
        return None

    def memory_in_use(self, index: int) -> Optional[float]:
        """Return the bytes in use on a device now; by default the last reading of its monitor; None if unknown."""
        if self._monitored is None:
            return None
        self._monitored.update()
        return self._monitored.last

    def memory_snapshot(self) -> Optional[Any]:
        """Return the segments of the device's allocator; None if not available."""
        return None

    def attach_memory_monitor(self, index: int, file: Path) -> None:
        """Use the readings of a device's monitor as an additional source of memory use.

        Args:
            index: index of the device.
            file: table written by the node's device monitor (`lit_glm.hardware.device_monitor`).
        """
        monitor = self.monitor or (self.name if self.name in MONITORS else "")
        if monitor:
            self._monitored = MonitoredMemory()
            self._monitored.start(file, index, monitor_of_name(monitor))

    def peak_memory(self, index: int) -> Optional[float]:
        """Return the highest memory in use on a device so far, bytes; by default its monitor's; None if unknown."""
        return None if self._monitored is None else self._monitored.peak()

    def total_memory(self, index: int) -> Optional[float]:
        """Return the total memory of a device, bytes; None if unknown."""
        return None
