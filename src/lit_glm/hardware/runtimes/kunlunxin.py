"""Kunlunxin's two runtimes: xmlir (torch 1.12, device "xpu") and XPyTorch (torch 2, patched to look like CUDA).

xmlir: Python 3.8, torch 1.12.1+cpu, package torch_xmlir. Never request "xpu" or "xccl" from torch itself: in current
torch these are Intel's names.
"""

import importlib
import importlib.util
import os
from typing import Any, Callable, ContextManager, Dict, Optional

import torch

from lit_glm.config.schema import LossScaleConfig
from lit_glm.hardware.monitors import physical_device_index, xpu_device_names, xpu_driver_version, xpu_total_memory
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.cuda import CUDARuntime


def tree_unsupported_reason(nodes: int) -> Optional[str]:
    """Return why BKCL's tree all-reduce cannot span this many nodes (FlagPerf's GLM case, environment_variables.sh)."""
    tree = os.environ.get("BKCL_SOCKET_FORCE_TREE", "0")
    if nodes == 1 or nodes % 2 == 0 or tree in ("", "0"):
        return None
    return (
        f"BKCL_SOCKET_FORCE_TREE={tree} (conf/hardware/, or your environment): a tree all-reduce needs an even number "
        f"of nodes, not {nodes}; set BKCL_SOCKET_FORCE_TREE=0, or use an even number"
    )


_VISIBLE = "XPU_VISIBLE_DEVICES"


def _import_vendor_amp() -> Any:
    """Import the vendor's package for mixed precision; None if there is none."""
    try:
        return importlib.import_module("torch_xmlir.amp")
    except ImportError:
        return None


class XMLIRRuntime(Runtime):
    """Runtime of torch_xmlir.xpu devices."""

    name = "xmlir"
    backend = "xccl"
    has_driver = True
    install_hint = (
        "the vendor's wheels, pip install --no-deps xmlir-*.whl xacc-*.whl, for Python 3.8 (docs/r300.md, lines 2 to 4)"
    )

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        """Return what is missing, without importing the package, because its switches are read at import."""
        if importlib.util.find_spec("torch_xmlir") is None:
            return "the package torch_xmlir is not installed (Kunlunxin's xmlir and xacc, Python 3.8, torch 1.12.1+cpu)"
        if not torch.__version__.startswith("1.12."):
            return (
                f"torch_xmlir is installed, but torch {torch.__version__} is not the 1.12.1+cpu of the native runtime"
            )
        return None

    def __init__(self) -> None:
        import torch_xmlir

        self._vendor: Any = torch_xmlir
        self._totals: Dict[int, Optional[float]] = {}
        if not self._vendor.xpu.is_available():
            raise RuntimeError("torch_xmlir sees no XPU: check the driver (xpu_smi) and XPU_VISIBLE_DEVICES")

    multi_node_unsupported_reason = staticmethod(tree_unsupported_reason)

    def device_count(self) -> int:
        return int(self._vendor.xpu.device_count())

    def device(self, index: int) -> torch.device:
        """Return xpu:N, created by the vendor's own function."""
        return self._vendor.device(f"xpu:{index}")

    def set_device(self, index: int) -> None:
        self._vendor.xpu.set_device(index)

    def synchronize(self) -> None:
        """Wait until the device has completed all work (`xpu.synchronize`, in some builds `xpu.xpu_synchronize`)."""
        xpu = self._vendor.xpu
        (xpu.synchronize if hasattr(xpu, "synchronize") else xpu.xpu_synchronize)()

    def after_step(self) -> None:
        """Empty the cache, as the published run does after every step."""
        self._vendor.xpu.empty_cache()

    def manual_seed(self, seed: int) -> None:
        super().manual_seed(seed)
        self._vendor.xpu.manual_seed_all(seed)

    def checkpoint(self) -> Callable[..., Any]:
        """Return the vendor's own function, because torch's saves the state of CUDA generators."""
        return importlib.import_module("torch_xmlir.nn.checkpoint").checkpoint

    def autocast(self, dtype: torch.dtype) -> ContextManager[Any]:
        """Return the vendor's own context, if the package has one."""
        vendor_autocast = getattr(_import_vendor_amp(), "autocast", None)
        return vendor_autocast(dtype=dtype) if vendor_autocast is not None else super().autocast(dtype)

    def loss_scaler(self, config: LossScaleConfig) -> Optional[Any]:
        """Return torch_xmlir.amp.GradScaler, which has no hysteresis and no minimum; None if there is none."""
        scaler = getattr(_import_vendor_amp(), "GradScaler", None)
        return None if scaler is None else scaler(init_scale=config.initial, growth_interval=config.window)

    def device_name(self, index: int) -> str:
        """Return the name that the runtime reports."""
        return str(self._vendor.xpu.get_device_name(index))

    def total_memory(self, index: int) -> Optional[float]:
        """Return the memory from the device's properties, else from the vendor's monitor."""
        try:
            return float(self._vendor.xpu.get_device_properties(index).total_memory)
        except (AttributeError, RuntimeError, TypeError):
            if index not in self._totals:
                self._totals[index] = xpu_total_memory(physical_device_index(index, _VISIBLE))
            return self._totals[index]

    def driver_version(self) -> Optional[str]:
        return xpu_driver_version()

    def memory_in_use(self, index: int) -> Optional[float]:
        """Return the monitor's last reading, else the runtime's value, if any."""
        return super().memory_in_use(index) or self._statistic("memory_reserved", index)

    def peak_memory(self, index: int) -> Optional[float]:
        """Return the larger of the monitor's largest reading and the runtime's peak, if any."""
        peaks = (super().peak_memory(index), self._statistic("max_memory_reserved", index))
        return max((value for value in peaks if value is not None), default=None)

    def _statistic(self, name: str, index: int) -> Optional[float]:
        """Return a statistic of the runtime's allocator; None in builds that lack it, or raise."""
        try:
            return float(getattr(self._vendor.xpu, name)(index))
        except (AttributeError, RuntimeError, TypeError, NotImplementedError):
            return None


class XPyTorchRuntime(CUDARuntime):
    """Runtime of torch.cuda as patched by the vendor; identified by the presence of torch_xmlir."""

    name = "xpytorch"
    has_tf32 = False
    install_hint = "XPyTorch, the vendor's own build of torch 2 with torch_xmlir (docs/hardware.md)"

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        """Return what is missing, without importing the package, because its switches are read at import."""
        if importlib.util.find_spec("torch_xmlir") is None:
            return "the package torch_xmlir is not installed (XPyTorch from Kunlunxin, for its own builds of torch 2)"
        if torch.__version__.startswith("1."):
            return f"torch {torch.__version__} is too old for the CUDA-compatible runtime"
        return None

    def __init__(self) -> None:
        import torch_xmlir  # noqa: F401

        super().__init__()
        if not torch.cuda.is_available():
            raise RuntimeError("torch_xmlir is installed but sees no XPU: check the driver (xpu-smi -m)")

    multi_node_unsupported_reason = staticmethod(tree_unsupported_reason)

    def driver_version(self) -> Optional[str]:
        return xpu_driver_version()

    def device_name(self, index: int) -> str:
        """Return the name from the monitor, because torch reports "GPU" for every device."""
        device = physical_device_index(index, "CUDA_VISIBLE_DEVICES")
        return "" if device is None else xpu_device_names().get(device, "")
