"""Lightning's view of a chip: an accelerator and two strategies, over any runtime."""

from datetime import timedelta
from typing import Any, Dict, List, Optional

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lit_glm.config.schema import TopologyConfig
from lit_glm.hardware import object_collectives
from lit_glm.hardware.runtimes.base import Runtime


class ChipAccelerator(Accelerator):
    """One chip, whatever it is; Lightning asks most questions of the class, so each runtime gets a subclass."""

    runtime: Runtime
    chip = ""

    def setup_device(self, device: torch.device) -> None:
        """Make the device current; a stand-in for a card has no index."""
        if device.index is not None:
            self.runtime.set_device(device.index)

    def teardown(self) -> None:
        """Nothing to undo."""

    def get_device_stats(self, device: Any) -> Dict[str, Any]:
        """Recorded elsewhere (`lit_glm.bench`)."""
        return {}

    @classmethod
    def parse_devices(cls, devices: Any) -> List[int]:
        """A number of devices to their indices."""
        return list(range(int(devices)))

    @classmethod
    def get_parallel_devices(cls, devices: List[int]) -> List[torch.device]:
        """Indices to devices."""
        return [cls.runtime.device(index) for index in devices]

    @classmethod
    def auto_device_count(cls) -> int:
        """Visible devices."""
        return cls.runtime.device_count()

    @classmethod
    def is_available(cls) -> bool:
        """It was made, so it is."""
        return True

    @classmethod
    def name(cls) -> str:
        """As in the hardware file."""
        return cls.chip


def make_accelerator(runtime: Runtime, name: str) -> ChipAccelerator:
    """An accelerator for a runtime, under the name of its hardware file."""
    subclass = type("ChipAccelerator", (ChipAccelerator,), {"runtime": runtime, "chip": name})
    accelerator: ChipAccelerator = subclass()
    return accelerator


class _OptimizerWrappingMixin:
    """Tells the precision plugin of the optimizers: after the move to the device, before a checkpoint is restored."""

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        getattr(self.precision_plugin, "wrap_optimizers", lambda _: None)(self.optimizers)  # type: ignore[attr-defined]


class ChipSingleDeviceStrategy(_OptimizerWrappingMixin, SingleDeviceStrategy):
    """One device, no process group."""


class ChipDDPStrategy(_OptimizerWrappingMixin, DDPStrategy):
    """Data parallel over any backend: nothing in it assumes CUDA."""

    def determine_ddp_device_ids(self) -> None:
        """None for every chip: device ids make torch open CUDA streams."""
        return

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Without device ids."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Objects travel as tensors on the chip."""
        return (
            object_collectives.broadcast_object(obj, self.root_device, src)
            if torch.distributed.is_initialized()
            else obj
        )

    def reduce(self, tensor: Any, group: Optional[Any] = None, reduce_op: Any = "mean") -> Any:
        """Sum and divide: not every backend has an average."""
        if isinstance(tensor, torch.Tensor) and torch.distributed.is_initialized() and reduce_op in ("mean", "avg"):
            summed = super().reduce(tensor, group, "sum")
            return summed / torch.distributed.get_world_size(group)
        return super().reduce(tensor, group, reduce_op)


def make_strategy(runtime: Runtime, topology: TopologyConfig, timeout_s: float) -> Strategy:
    """The strategy of a topology.

    Args:
        runtime: whose devices.
        topology: how many.
        timeout_s: a collective that takes longer ends the job.
    """
    if topology.world_size == 1:
        return ChipSingleDeviceStrategy(device=runtime.device(0))
    return ChipDDPStrategy(
        process_group_backend=runtime.backend,
        timeout=timedelta(seconds=timeout_s),
        gradient_as_bucket_view=True,
    )
