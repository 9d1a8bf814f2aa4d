"""Both libraries give the same linear layer, gradients too; half precision and small layers stay torch's."""

from typing import Any, List

import pytest
import torch

from lit_glm.hardware.runtimes import cpu as linear
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.model.glm import Linear
from lit_glm.model.runtime_ops import RuntimeOps

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def gradients(way: Any, shape: "tuple[int, int, int]", bias: bool) -> List[torch.Tensor]:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    offset = torch.randn(outputs, requires_grad=True) if bias else None
    out = way(x, weight, offset)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = [out, x.grad, weight.grad] + ([offset.grad] if offset is not None else [])
    return [tensor.detach() for tensor in found if tensor is not None]


@needs_onednn
@pytest.mark.parametrize("shape", [(40, 24, 8), (40, 8, 24), (3, 64, 200), (1, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_libraries_agree(shape: Any, bias: bool) -> None:
    ours = gradients(linear._OneDNNLinear.apply, shape, bias)
    theirs = gradients(torch.nn.functional.linear, shape, bias)
    assert len(ours) == len(theirs) == 3 + bias
    for one, other in zip(ours, theirs):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[Any] = []
    monkeypatch.setattr(linear, "PREFERS_ONEDNN", True)
    monkeypatch.setattr(linear, "_WORTH_IT", 4096)
    real = linear._onednn_matmul
    monkeypatch.setattr(linear, "_onednn_matmul", lambda *arguments: calls.append(1) or real(*arguments))
    layer, x = Linear(32, 64, RuntimeOps(linear.linear)), torch.randn(16, 32)
    layer(x)
    assert len(calls) == 1
    layer(x[:1])  # too small
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    layer.double()(x.double())
    assert len(calls) == 1


@needs_onednn
def test_frozen_weights_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4)
    linear._OneDNNLinear.apply(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(8, 4))


def test_a_processor_without_bf16_products_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any) -> Any:
        raise RuntimeError("could not create a primitive descriptor for the inner product")

    monkeypatch.setattr(linear, "_POINTWISE", refuses)
    assert CPURuntime().model_ops().linear_gelu is None


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="needs torch 2")
def test_a_linear_layer_and_gelu_in_one_are_those_in_two() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, 64), torch.randn(96, 64) / 8, torch.randn(96)
    assert linear.linear_gelu(x, weight, bias) is None  # fp32: not faster
    if not linear.supports_bf16_gelu():
        pytest.skip("oneDNN does not multiply in bf16 on this processor")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear.linear_gelu(x, weight, bias)
    assert out is not None
    exact = torch.nn.functional.gelu(x.double() @ weight.double().t() + bias, approximate="tanh")
    assert out.dtype is torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.05
