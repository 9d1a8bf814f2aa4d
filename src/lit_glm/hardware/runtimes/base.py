"""What a chip's runtime must offer: the one interface between this project and any vendor's software."""

from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional

import torch
from torch import Tensor

from lit_glm.config.schema import LossScaleConfig
from lit_glm.model.runtime_ops import RuntimeOps


class Runtime:
    """Devices of one kind. Subclasses say how; what a vendor lacks stays None or does nothing.

    The class is asked whether it is there; only then is it made, which imports the vendor's package.
    """

    name = ""
    has_driver = False
    """Whether its devices are cards with a driver of their own."""
    simulated = False
    """Whether its devices are pretended: such figures are no measurements of the chip."""
    shares_memory = False
    """Whether the devices of a node have one memory between them: then `mem` is the sum over its ranks."""
    has_tf32 = False
    """Whether fp32 products can be rounded to TF32."""
    pins_memory = False
    """Whether copies to the device go through page-locked memory."""
    backend = "gloo"
    """Collective backend for torch.distributed."""

    install_hint = ""
    """How to get what it needs."""
    monitor = ""
    """package.module.NAME of a `lit_glm.hardware.monitors.Monitor`, in a module that imports no torch; "": none."""

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        """Why this runtime cannot be used here; None if it can. Must not import the vendor's package."""
        return None

    @staticmethod
    def multi_node_unsupported_reason(nodes: int) -> Optional[str]:
        """Why the vendor's collectives cannot work between so many nodes; None if they can."""
        return None

    def device_count(self) -> int:
        """Devices that this process can see."""
        raise NotImplementedError

    def device(self, index: int) -> torch.device:
        """The device that tensors live on."""
        raise NotImplementedError

    def set_device(self, index: int) -> None:
        """Make a device the current one of this process."""

    def synchronize(self) -> None:
        """Wait until the current device has nothing left to do."""

    def to_host_async(self, values: Tensor, pending: Optional[Any] = None) -> Callable[[], List[Any]]:
        """Begin to read a few numbers of the device; whoever asks for them waits for them.

        Args:
            values: [N], not changed until they are asked for.
            pending: a collective that still writes them (what `async_op=True` returns).

        Returns:
            Gives the numbers. By default they are read when they are asked for, behind everything that the device was
            given meanwhile; a runtime with streams waits for the numbers alone.
        """

        def read() -> List[Any]:
            if pending is not None:
                pending.wait()
            return values.tolist()

        return read

    def after_step(self) -> None:
        """What the vendor asks for after each step."""

    def manual_seed(self, seed: int) -> None:
        """Seed the processor's generator and that of the current device.

        Called at every step: `torch.manual_seed` would note a stack trace for each kind of device that is not there.
        """
        torch.default_generator.manual_seed(seed)

    def checkpoint(self) -> Callable[..., Any]:
        """`fn(f, *args)` that recomputes f in the backward pass."""
        from torch.utils.checkpoint import checkpoint

        def recompute(function: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(function, *args, use_reentrant=False)

        return recompute

    def model_ops(self) -> RuntimeOps:
        """What the model is to call in this runtime's own way."""
        return RuntimeOps(checkpoint=self.checkpoint())

    def autocast(self, dtype: torch.dtype) -> ContextManager[Any]:
        """A context in which matrix products are computed in a half precision."""
        return torch.autocast(self.device(0).type, dtype=dtype)

    def loss_scaler(self, config: LossScaleConfig) -> Optional[Any]:
        """The vendor's own scaler for mixed fp16, as `DynamicLossScale` has it; None: ours."""
        return None

    def allow_tf32(self, allowed: bool) -> None:
        """Let fp32 products round their inputs to 10 bits of mantissa, where the chip has that."""

    def precision_hint(self, name: str) -> str:
        """What to know before computing in a precision here; "" where there is nothing to say."""
        return ""

    def device_name(self, index: int) -> str:
        """What the device calls itself."""
        return ""

    def driver_version(self) -> Optional[str]:
        """Version of the cards' driver; None where nothing says it."""
        return None

    def library_versions(self) -> Dict[str, str]:
        """Versions of the vendor's libraries that torch uses, by name; empty where there are none to report."""
        return {}

    def num_processes(self, index: int) -> Optional[int]:
        """How many processes compute on a device, this one among them; None where nothing says it."""
        return None

    def memory_in_use(self, index: int) -> Optional[float]:
        """Memory in use on a device at this moment, or at the monitor's last reading, bytes."""
        return None

    def memory_snapshot(self) -> Optional[Any]:
        """What the device's allocator holds, segment by segment; None where it does not tell."""
        return None

    def attach_memory_monitor(self, index: int, file: Path) -> None:
        """Take a device's memory from its monitor too.

        Args:
            index: of the device.
            file: that the node's watch writes (`lit_glm.hardware.device_monitor`).
        """

    def peak_memory(self, index: int) -> Optional[float]:
        """Highest memory in use on a device so far, bytes; None where nothing can say."""
        return None

    def total_memory(self, index: int) -> Optional[float]:
        """Memory of a device, bytes; None where the runtime cannot say."""
        return None
