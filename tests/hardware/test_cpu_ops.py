"""What a CPU computes in its own way equals torch's: linear layers by both libraries, dropout by its statistics."""

from typing import Any, List

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.hardware.runtimes import cpu_ops
from lit_glm.hardware.runtimes.cpu_ops import dropout
from lit_glm.model.glm import Dropout, Linear
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
def test_onednn_linear_and_gradients_match_torch(shape: Any, bias: bool) -> None:
    ours = gradients(cpu_ops._OneDNNLinear.apply, shape, bias)
    theirs = gradients(torch.nn.functional.linear, shape, bias)
    assert len(ours) == len(theirs) == 3 + bias
    for one, other in zip(ours, theirs):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_small_autocast_and_double_inputs_do_not_use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[Any] = []
    monkeypatch.setattr(cpu_ops, "PREFERS_ONEDNN", True)
    monkeypatch.setattr(cpu_ops, "_MIN_MULTIPLY_ADDS", 4096)
    real = cpu_ops._onednn_matmul
    monkeypatch.setattr(cpu_ops, "_onednn_matmul", lambda *arguments: calls.append(1) or real(*arguments))
    layer, x = Linear(32, 64, RuntimeOps(cpu_ops.linear)), torch.randn(16, 32)
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
    cpu_ops._OneDNNLinear.apply(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(8, 4))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_rate_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(1000, 1001, dtype=dtype)
    out = dropout(x, p)
    assert out.dtype is dtype
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((out == 0).double().mean()) - p) < 5 * deviation
    assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4 if dtype is torch.float32 else 4e-3)
    # A zero's distance from the one before is drawn; that must tell nothing of those behind.
    kept = (out != 0).double().view(-1)
    for lag in (1, 2, 3, 4, 10, 64):
        assert abs(float((kept[:-lag] * kept[lag:]).mean()) - (1 - p) ** 2) < 10 * deviation


@pytest.mark.parametrize("p", [0.02, 0.1, 0.6])
def test_dropout_is_uniform_over_a_small_tensor(p: float) -> None:
    torch.manual_seed(11)
    draws, x = 4000, torch.ones(2, 9)
    share = sum((dropout(x, p) == 0).double() for _ in range(draws)) / draws
    assert float((share - p).abs().max()) < 5 * (p * (1 - p) / draws) ** 0.5


def test_dropout_mask_repeats_with_the_seed_and_changes_per_call() -> None:
    x = torch.ones(64, 7)
    torch.manual_seed(5)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.3))
    assert not torch.equal(first, second)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), p=st.floats(0.0, 0.99, allow_subnormal=False)
)  # the process may flush them
def test_dropout_gradient_uses_the_mask_of_the_forward_pass(rows: int, columns: int, p: float) -> None:
    x = torch.rand(rows, columns).add_(1.0).requires_grad_()
    out = dropout(x, p)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_dropout_with_rate_near_one_is_finite() -> None:
    assert dropout(torch.ones(1000, 100), 0.9999999).isfinite().all()


def test_dropout_is_identity_in_eval_mode() -> None:
    layer, x = Dropout(0.5, RuntimeOps(dropout=dropout)), torch.ones(8, 8)
    assert torch.equal(layer.eval()(x), x)
    assert not torch.equal(layer.train()(x), x)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("onto_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_fused_dropout_add_matches_separate_operations(p: float, onto_type: torch.dtype, x_type: torch.dtype) -> None:
    """A residual stays in fp32 where what is added to it is a half."""
    x, onto = torch.rand(40, 9).to(x_type).requires_grad_(), torch.rand(40, 9).to(onto_type).requires_grad_()
    found = []
    for together in (True, False):
        torch.manual_seed(7)
        out = dropout(x, p, onto) if together else onto + dropout(x, p)
        found.append((out, *torch.autograd.grad((out * torch.arange(9.0)).sum(), (x, onto))))
    for one, other in zip(*found):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)
