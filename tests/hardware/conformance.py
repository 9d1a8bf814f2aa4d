"""What a runtime must do to serve: run it against one of yours, on a machine that has the chip.

    python -m pytest tests/hardware/conformance.py --runtime=package.module.Class

Each check is one promise of `lit_glm.hardware.runtimes.base.Runtime` and prints one line; its name says which promise.
`verify` then judges the arithmetic, on the real step.
"""

import math
from datetime import timedelta
from typing import Any, Tuple

import pytest
import torch
import torch.nn.functional as F

from lit_glm.config.schema import LossScaleConfig
from lit_glm.hardware.device_monitor import monitor_of_name
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import import_runtime_class
from lit_glm.verification.timing_check import check_clock


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest) -> Runtime:
    target = request.config.getoption("--runtime") or "lit_glm.hardware.runtimes.cpu.CPURuntime"
    kind = import_runtime_class(target)
    reason = kind.unavailable_reason()
    if reason is not None:
        pytest.skip(f"{target} cannot be used here: {reason}")
    made = kind()
    made.set_device(0)
    return made


@pytest.fixture
def x(runtime: Runtime) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 32).to(runtime.device(0))


def test_runtime_has_name_backend_and_device_name(runtime: Runtime) -> None:
    assert runtime.name
    assert isinstance(runtime.backend, str)
    assert isinstance(runtime.device_name(0), str)


def test_every_counted_device_holds_tensors(runtime: Runtime) -> None:
    assert isinstance(runtime.device_count(), int)
    assert runtime.device_count() >= 1
    try:
        for index in range(runtime.device_count()):
            runtime.set_device(index)
            device = runtime.device(index)
            assert isinstance(device, torch.device)
            there = torch.arange(5).to(device)
            assert there.device.type == device.type
            assert there.cpu().tolist() == [0, 1, 2, 3, 4]
    finally:
        runtime.set_device(0)


def test_runtime_monitor_returns_readings(runtime: Runtime) -> None:
    if not runtime.monitor:
        pytest.skip("it has no monitor of its own")
    assert monitor_of_name(runtime.monitor).read(None), "no readings"


def test_synchronize_returns_when_the_work_is_done(runtime: Runtime) -> None:
    """A chain of products, each of the last one's result; reading its end must take little of the time."""
    check = check_clock(runtime)
    assert check.status != "fail", check.message


def test_device_tensors_do_not_mix_with_host_tensors(runtime: Runtime, x: torch.Tensor) -> None:
    assert x.device.type == runtime.device(0).type
    assert (x + x).device == x.device
    if x.device.type != "cpu":
        with pytest.raises((RuntimeError, TypeError)):
            _ = x + torch.ones(64, 32)  # a tensor of the host's takes no part without being copied


def test_manual_seed_determines_the_dropout_mask(runtime: Runtime, x: torch.Tensor) -> None:
    def drawn(seed: int) -> torch.Tensor:
        runtime.manual_seed(seed)
        return F.dropout(x, 0.5).cpu()

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_to_host_async_returns_the_values_at_call_time(runtime: Runtime, x: torch.Tensor) -> None:
    values = x[0, :3].clone()
    expected, read = values.tolist(), runtime.to_host_async(values)
    _ = [x @ x.t() for _ in range(10)]  # asked for meanwhile
    again = runtime.to_host_async(values + 1.0)
    assert read() == pytest.approx(expected)
    assert again() == pytest.approx([value + 1.0 for value in expected])


def test_to_host_async_waits_for_a_pending_collective(runtime: Runtime, x: torch.Tensor) -> None:
    waited = []

    class Pending:
        def wait(self) -> None:
            waited.append(True)

    assert runtime.to_host_async(x[0, :1].clone(), Pending())() == pytest.approx(x[0, :1].tolist())
    assert waited


def test_fused_attention_matches_matmul_attention(runtime: Runtime) -> None:
    if not hasattr(F, "scaled_dot_product_attention"):
        pytest.skip("this torch has no fused attention")
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 4, 24, 16) for _ in range(3))
    allowed = torch.ones(24, 24, dtype=torch.bool).tril()
    exact = torch.softmax((q @ k.transpose(-1, -2) / 4.0).masked_fill(~allowed, -math.inf), -1) @ v
    device = runtime.device(0)
    found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), allowed.to(device))
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-2, atol=1e-2)


def test_dropout_draws_from_the_devices_own_generator(runtime: Runtime, x: torch.Tensor) -> None:
    """What the host draws meanwhile changes nothing."""

    def drawn(on_host: int) -> torch.Tensor:
        runtime.manual_seed(5)
        if runtime.device(0).type != "cpu":
            torch.rand(on_host)
        return F.dropout(x, 0.5).cpu()

    assert torch.equal(drawn(0), drawn(7))


def test_the_collectives_of_its_backend_take_device_tensors(runtime: Runtime, tmp_path: Any) -> None:
    """With one rank: broadcast, all-reduce, all-gather and a barrier."""
    known = [name.lower() for name in vars(torch.distributed.Backend).values() if isinstance(name, str)]
    known += [name.lower() for name in getattr(torch.distributed.Backend, "_plugins", {})]
    assert runtime.backend.lower() in known, f"{runtime.backend} is registered by nobody"
    torch.distributed.init_process_group(
        runtime.backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        values = torch.arange(6.0).to(runtime.device(0))
        torch.distributed.broadcast(values, 0)
        torch.distributed.all_reduce(values)
        gathered = [torch.empty_like(values)]
        torch.distributed.all_gather(gathered, values)
        torch.distributed.barrier()
        for found in (values, gathered[0]):
            assert found.cpu().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_or_raises(runtime: Runtime, x: torch.Tensor, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(32, 8).to(x.device)
    try:
        with runtime.autocast(dtype):
            out = layer(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return  # refused when a run starts: it must not compute in another type without a word
    assert out.dtype in (dtype, torch.float32)


def test_recomputation_gives_the_same_gradients(runtime: Runtime, x: torch.Tensor) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).to(x.device)
    gradients = []
    for how in (lambda f, v: f(v), runtime.checkpoint()):
        layer.zero_grad()
        how(layer, x.clone().requires_grad_()).square().sum().backward()
        gradients.append(layer[0].weight.grad.cpu().clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_linear_op_matches_torch_on_cpu(runtime: Runtime, x: torch.Tensor) -> None:
    weight, bias = torch.randn(16, 32), torch.randn(16)
    ours = runtime.model_ops().linear(x, weight.to(x.device), bias.to(x.device))
    torch.testing.assert_close(ours.cpu(), F.linear(x.cpu(), weight, bias), rtol=1e-3, atol=1e-3)


def test_optimizer_update_matches_cpu(runtime: Runtime, x: torch.Tensor) -> None:
    found = []
    for device in (x.device, torch.device("cpu")):
        torch.manual_seed(1)
        layer = torch.nn.Linear(32, 4).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(x.to(device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append(layer.weight.detach().cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def _memory(runtime: Runtime) -> Tuple[Any, Any, Any]:
    return runtime.memory_in_use(0), runtime.peak_memory(0), runtime.total_memory(0)


def test_memory_readings_are_consistent_or_none(runtime: Runtime, x: torch.Tensor) -> None:
    now, peak, total = _memory(runtime)
    for value in (now, peak, total):
        assert value is None or value > 0
    if peak is not None and total is not None:
        assert peak <= total
    if now is not None and peak is not None and not runtime.shares_memory:
        assert peak >= 0.5 * now


def test_runtime_loss_scaler_has_the_required_interface(runtime: Runtime, x: torch.Tensor) -> None:
    scaler = runtime.loss_scaler(LossScaleConfig(initial=8.0))
    if scaler is None:
        return  # ours serves
    assert float(scaler.scale(torch.ones((), device=x.device))) == pytest.approx(float(scaler.get_scale()))
    assert set(scaler.state_dict())
