"""Lightning accelerator and strategies that work with any runtime."""

from datetime import timedelta
from typing import Any, Dict, List, Optional

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lit_glm.config.schema import TopologyConfig
from lit_glm.hardware import object_collectives
from lit_glm.hardware.runtimes.base import Runtime


class RuntimeAccelerator(Accelerator):
    """Accelerator for any runtime; Lightning mostly calls class methods, so each runtime gets a subclass."""

    runtime: Runtime
    accelerator_name = ""

    def setup_device(self, device: torch.device) -> None:
        """Make the device current; a simulated device has no index."""
        if device.index is not None:
            self.runtime.set_device(device.index)

    def teardown(self) -> None:
        """Do nothing."""

    def get_device_stats(self, device: Any) -> Dict[str, Any]:
        """Return nothing; `lit_glm.metrics` records statistics."""
        return {}

    @classmethod
    def parse_devices(cls, devices: Any) -> List[int]:
        """Convert a number of devices to their indices."""
        return list(range(int(devices)))

    @classmethod
    def get_parallel_devices(cls, devices: List[int]) -> List[torch.device]:
        """Convert indices to devices."""
        return [cls.runtime.device(index) for index in devices]

    @classmethod
    def auto_device_count(cls) -> int:
        """Return the number of visible devices."""
        return cls.runtime.device_count()

    @classmethod
    def is_available(cls) -> bool:
        """Return True: the runtime is checked before the accelerator is created."""
        return True

    @classmethod
    def name(cls) -> str:
        """Return the name in the hardware file."""
        return cls.accelerator_name


def make_accelerator(runtime: Runtime, name: str) -> RuntimeAccelerator:
    """Create an accelerator for a runtime, under the name of its hardware file."""
    subclass = type("RuntimeAccelerator", (RuntimeAccelerator,), {"runtime": runtime, "accelerator_name": name})
    return subclass()


class _OptimizerWrappingMixin:
    """Mixin that passes optimizers to the precision plugin, after the move to the device and before restoring."""

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        getattr(self.precision_plugin, "wrap_optimizers", lambda _: None)(self.optimizers)  # type: ignore[attr-defined]


class RuntimeSingleDeviceStrategy(_OptimizerWrappingMixin, SingleDeviceStrategy):
    """Strategy for one device, without a process group."""


class RuntimeDDPStrategy(_OptimizerWrappingMixin, DDPStrategy):
    """Data-parallel strategy for any backend; does not assume CUDA."""

    def determine_ddp_device_ids(self) -> None:
        """Return None for every device type, because device ids make torch open CUDA streams."""
        return

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks, without device ids."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object as device tensors."""
        return (
            object_collectives.broadcast_object(obj, self.root_device, src)
            if torch.distributed.is_initialized()
            else obj
        )

    def reduce(self, tensor: Any, group: Optional[Any] = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor; averages by sum and division, because not every backend has them."""
        if isinstance(tensor, torch.Tensor) and torch.distributed.is_initialized() and reduce_op in ("mean", "avg"):
            summed = super().reduce(tensor, group, "sum")
            return summed / torch.distributed.get_world_size(group)
        return super().reduce(tensor, group, reduce_op)


def make_strategy(runtime: Runtime, topology: TopologyConfig, timeout_s: float) -> Strategy:
    """Create the strategy of a topology."""
    if topology.world_size == 1:
        return RuntimeSingleDeviceStrategy(device=runtime.device(0))
    return RuntimeDDPStrategy(
        process_group_backend=runtime.backend,
        timeout=timedelta(seconds=timeout_s),
        gradient_as_bucket_view=True,
    )
