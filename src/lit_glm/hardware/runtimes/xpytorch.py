"""Kunlunxin's CUDA-compatible runtime: torch is patched at import, tensors live on "cuda", nccl is rerouted."""

import importlib.util
from typing import Optional

import torch

from lit_glm.hardware.monitors import card_of, xpu_driver, xpu_names
from lit_glm.hardware.runtimes.bkcl import tree_cannot_span
from lit_glm.hardware.runtimes.cuda import CUDARuntime


class XPyTorchRuntime(CUDARuntime):
    """torch.cuda as the vendor patches it; told from NVIDIA by the presence of torch_xmlir."""

    name = "xpytorch"
    has_tf32 = False
    install = "XPyTorch, the vendor's own build of torch 2 with torch_xmlir (docs/hardware.md)"

    @staticmethod
    def missing() -> Optional[str]:
        """Looks for the package without importing it: its switches are read at import."""
        if importlib.util.find_spec("torch_xmlir") is None:
            return "the package torch_xmlir is not installed (XPyTorch from Kunlunxin, for its own builds of torch 2)"
        if torch.__version__.startswith("1."):
            return f"torch {torch.__version__} is too old for the CUDA-compatible runtime"
        return None

    def __init__(self) -> None:
        import torch_xmlir  # noqa: F401

        super().__init__()
        if not torch.cuda.is_available():
            raise RuntimeError("torch_xmlir is installed but no XPU answers: check the driver (xpu-smi -m)")

    @staticmethod
    def cannot_span(nodes: int) -> Optional[str]:
        """A tree has pairs of nodes."""
        return tree_cannot_span(nodes)

    def driver_version(self) -> Optional[str]:
        """As the vendor's monitor says."""
        return xpu_driver()

    def device_name(self, index: int) -> str:
        """Asked of the monitor: torch says "GPU" for every card."""
        card = card_of(index, "CUDA_VISIBLE_DEVICES")
        return "" if card is None else xpu_names().get(card, "")
