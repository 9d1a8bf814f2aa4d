"""A processor's linear layers by whichever of torch's two libraries is fast on it.

torch computes fp32 products with MKL, which is half as fast as its other library, oneDNN, on processors that are not
Intel's (`benchmarks/products.py` has the measurement). Elsewhere, and in every other type, torch decides.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import onednn_linear
from lit_glm.model.runtime_ops import is_cpu_autocast_enabled

_WORTH_IT = 2**23  # multiply-adds from which the other library's call costs less than it saves


def _is_intel_cpu() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file if line.startswith("vendor_id"))
    except OSError:
        return True


PREFERS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not _is_intel_cpu()
_POINTWISE = onednn_linear()


def _onednn_matmul(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Multiply x with the transposed weight, by oneDNN."""
    if _POINTWISE is not None:
        out: Tensor = _POINTWISE(x, weight, bias, "none", [], "")
        return out
    return F.linear(x.contiguous().to_mkldnn(), weight.contiguous(), bias).to_dense()  # before torch 2


class _OneDNNLinear(torch.autograd.Function):
    """A linear layer, all three of its products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = _onednn_matmul(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[T, out], [T, in] -> [out, in]; the library copies what comes first, so take the order that copies less."""
    rows, outputs, inputs = len(x), grad.shape[1], x.shape[1]
    if rows * outputs <= rows * inputs + outputs * inputs:
        return _onednn_matmul(grad.t(), x.t(), None)
    return _onednn_matmul(x.t(), grad.t(), None).t().contiguous()


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """[..., in] -> [..., out].

    Args:
        x: [T, in]; with other dimensions it is torch's to decide.
        weight: [out, in].
        bias: [out].
    """
    if (
        PREFERS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and x.dim() == 2
        and len(x) * weight.numel() >= _WORTH_IT
        and not is_cpu_autocast_enabled()
    ):
        out: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Optional[Tensor]:
    """A linear layer in bf16 with GELU computed as its results come, which saves the slower half of both.

    Args:
        x: [T, in].
        weight: [out, in].
        bias: [out].

    Returns:
        [T, out]; None where torch has no such product, and outside of autocast to bf16.
    """
    if _POINTWISE is None or not is_cpu_autocast_enabled() or _cpu_autocast_dtype() is not torch.bfloat16:
        return None
    half = [part.to(torch.bfloat16) for part in (x, weight, bias)]
    out: Tensor = _POINTWISE(*half, "gelu", [], "tanh")
    return out


def supports_bf16_gelu() -> bool:
    """Whether oneDNN multiplies in bf16 here, found by a product of one number: it does not before AVX-512."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    try:
        return _POINTWISE is not None and len(_POINTWISE(one, one, one[0], "gelu", [], "tanh")) == 1
    except RuntimeError:
        return False


def _cpu_autocast_dtype() -> torch.dtype:
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype("cpu")
    return torch.get_autocast_cpu_dtype()  # before torch 2.4
