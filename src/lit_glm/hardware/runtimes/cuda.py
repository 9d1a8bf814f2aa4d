"""CUDA runtime: NVIDIA devices, and those of other vendors whose torch implements torch.cuda."""

from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor

from lit_glm.hardware.monitors import nvidia_driver_version, nvml_processes
from lit_glm.hardware.runtimes.base import Runtime


class CUDARuntime(Runtime):
    """Runtime of torch.cuda devices."""

    name = "cuda"
    backend = "nccl"
    has_tf32 = True
    pins_memory = True
    has_driver = True
    install_hint = (
        "a torch build for the device (NVIDIA: https://pytorch.org/get-started; others: from the vendor) and its driver"
    )

    def __init__(self) -> None:
        self._was_shared = False
        # cuDNN's attention, which torch prefers on H100 and later, builds a plan for every new shape (23 to 37 ms each;
        # batches without padding have a new shape in every step), and some of its versions round the share of dropout
        # to sixteenths (https://github.com/pytorch/pytorch/issues/174245).
        if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
            torch.backends.cuda.enable_cudnn_sdp(False)

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        """Return why torch sees no CUDA device; None if it does."""
        if torch.cuda.is_available():
            return None
        build = "a build of torch with CUDA" if torch.version.cuda is None else "a working driver (see nvidia-smi)"
        return f"torch {torch.__version__} sees no CUDA device: {build} is missing"

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def device(self, index: int) -> torch.device:
        return torch.device("cuda", index)

    def set_device(self, index: int) -> None:
        torch.cuda.set_device(index)

    def manual_seed(self, seed: int) -> None:
        super().manual_seed(seed)
        torch.cuda.manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def to_host_async(self, values: Tensor, pending: Optional[Any] = None) -> Callable[[], List[Any]]:
        """Start a copy to page-locked memory, on a separate stream if a collective must finish first."""
        stream = torch.cuda.current_stream() if pending is None else torch.cuda.Stream()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())  # whatever `pending` waits for, `values` has been computed
        with torch.cuda.stream(stream):
            if pending is not None:
                pending.wait()  # makes the stream wait, not the host
                values.record_stream(stream)
            host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)

        def read() -> List[Any]:
            done.synchronize()
            return host.tolist()

        return read

    def allow_tf32(self, allowed: bool) -> None:
        """Set both TF32 switches; torch's own default for products depends on its version."""
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed

    def device_name(self, index: int) -> str:
        return str(torch.cuda.get_device_name(index))

    def peak_memory(self, index: int) -> Optional[float]:
        """Return the larger of the monitor's largest reading and the peak reserved by torch's allocator.

        If another process was seen on the device, return the allocator's peak: the readings include its memory.
        """
        reserved = float(torch.cuda.max_memory_reserved(index))
        # The readings include memory outside the allocator: the context, and buffers of collectives.
        return reserved if self._is_shared(index) else max(super().peak_memory(index) or 0.0, reserved)

    def _is_shared(self, index: int) -> bool:
        """Return whether another process uses the device, or did at an earlier call."""
        self._was_shared = self._was_shared or (self.num_processes(index) or 1) > 1
        return self._was_shared

    def memory_snapshot(self) -> Optional[Any]:
        """Return the snapshot of torch's allocator (readable by pytorch.org/memory_viz)."""
        return torch.cuda.memory_snapshot()

    def num_processes(self, index: int) -> Optional[int]:
        return nvml_processes(index, "CUDA_VISIBLE_DEVICES")

    def memory_in_use(self, index: int) -> Optional[float]:
        """Return the monitor's last reading, else the memory reserved by the allocator."""
        self._is_shared(index)
        return super().memory_in_use(index) or float(torch.cuda.memory_reserved(index))

    def driver_version(self) -> Optional[str]:
        return nvidia_driver_version()

    def library_versions(self) -> Dict[str, str]:
        """CUDA, cuDNN and NCCL that torch was built with."""
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        versions = {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl,
        }
        return {name: str(version) for name, version in versions.items() if version is not None}

    def total_memory(self, index: int) -> Optional[float]:
        return float(torch.cuda.get_device_properties(index).total_memory)
