"""Runtimes with one fault each: the check concerned names it, and a whole verification fails in nothing else.

Test doubles: the processor, with a fault put in below autograd, where a chip's own software would have it.
"""

import functools
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Iterable, Iterator, List, Tuple

import pytest
import torch
import torch.nn.functional as F

from lit_glm.check_result import CheckResult
from lit_glm.compat import dispatch_mode
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import RunError
from lit_glm.hardware.runtimes import cpu_ops
from lit_glm.hardware.runtimes.cpu import CPURuntime, accumulates_bf16_in_fp32
from lit_glm.model.attention import DotProductAttention
from lit_glm.model.runtime_ops import RuntimeOps
from lit_glm.verification import acceptance, collectives_check, model_check, timing_check
from lit_glm.verification.operator_check import OperatorRecorder, OperatorResult, operator_name, tensors_in
from lit_glm.verification.stepper import VerifyFixture, make_fixture

Failed = List[Tuple[str, str]]


_SMALL = {**acceptance._NARROW, "num_layers": 2, "hidden_size": 32, "vocab_size": 128, "max_sequence_length": 48}


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_check, "_AT_LEAST_S", 0.02)
    monkeypatch.setattr(timing_check, "_BYTES", (2**20, 2**20))
    monkeypatch.setattr(timing_check, "_SIZES", (256,))
    monkeypatch.setattr(acceptance, "_NARROW", _SMALL)


@functools.lru_cache(maxsize=None)
def configuration(*overrides: str) -> TrainConfig:
    return validate_config(compose_config("train", ["precision=fp32", *overrides]), TrainConfig)


@functools.lru_cache(maxsize=None)
def small_configuration(*overrides: str) -> Tuple[TrainConfig, VerifyFixture]:
    """What `verify` makes of a configuration on a slow device."""
    full = configuration(*overrides)
    model: Any = _SMALL
    config = replace(
        full, model=replace(full.model, **model), data=replace(full.data, max_seq_length=model["max_sequence_length"])
    )
    return config, make_fixture(config)


def failed(runtime: Any = None, *overrides: str) -> Failed:
    """Names and messages of the checks that fail in a whole verification."""
    checks = acceptance.AcceptanceTest([configuration(*overrides)], runtime or CPURuntime(), full_model=False).checks()
    return failures(checks)


def failed_operators(*overrides: str) -> Failed:
    """The same of the check of the operators alone."""
    config, fixture = small_configuration(*overrides)
    return failures(acceptance._check_operators(config, fixture, CPURuntime(), False, []))


def failures(checks: Iterable[CheckResult]) -> Failed:
    return [(check.name, check.message) for check in checks if check.status == "fail"]


@contextmanager
def with_fault(name: str, fault: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """An operator's calls in anything but float64 go to `fault`."""

    def see(operator: Any, args: Any, kwargs: Any) -> Any:
        if operator_name(operator) != name or any(
            tensor.dtype is torch.float64 for tensor in tensors_in([args, kwargs])
        ):
            return operator(*args, **kwargs)
        return fault(operator, args, kwargs)

    with dispatch_mode(see):
        yield


def test_verify_passes_on_cpu() -> None:
    assert failed() == []


@pytest.mark.slow
@pytest.mark.skipif(
    not accumulates_bf16_in_fp32(), reason="its products are wrong here, which takes minutes to be told"
)
def test_verify_passes_on_cpu_in_bf16() -> None:
    assert failed(None, "precision=bf16") == []


@pytest.mark.skipif(not accumulates_bf16_in_fp32(), reason="its products are wrong here")
@pytest.mark.parametrize("precision", ["bf16", "amp", "fp16"])
def test_layer_checks_pass_for_a_small_model(precision: str) -> None:
    config = configuration("model=glm_tiny", "data=synthetic", f"precision={precision}")
    checks = model_check.check_layers(config, make_fixture(config), CPURuntime(), tf32=False)
    assert [(check.status, check.message) for check in checks if check.status != "ok"] == []


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has no fused attention")
@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.2, "differs")])
def test_attention_gradient_check_with_similar_values(factor: float, status: str) -> None:
    """They are small differences of numbers that were rounded to bf16; nevertheless a wrong kernel is found."""
    generator = torch.Generator().manual_seed(0)
    q, k, noise = (torch.randn(2, 4, 200, 64, generator=generator).bfloat16() for _ in range(3))
    v = (1.0 + 0.1 * noise).requires_grad_()
    recorder = OperatorRecorder(torch.device("cpu"), tf32=False)
    q.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v)

    def wrong(operator: Any, args: Any, kwargs: Any) -> Any:
        return tuple(result * factor for result in operator(*args, **kwargs))

    name = "_scaled_dot_product_flash_attention_for_cpu_backward"
    with with_fault(name, wrong), recorder.recording():
        out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert [call.status for call in recorder.results.values() if call.name == name] == [status]


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.2, "differs")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_gradient_check_with_sequential_sums(dtype: torch.dtype, factor: float, status: str) -> None:
    """One thread of torch's kernel adds the gradients of the weights in their dtype."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2000, 64, generator=generator).to(dtype) for _ in range(2))
    weight, bias = torch.ones(64, dtype=dtype, requires_grad=True), torch.zeros(64, dtype=dtype, requires_grad=True)
    out = F.layer_norm(x.requires_grad_(), [64], weight, bias)

    def wrong(operator: Any, args: Any, kwargs: Any) -> Any:
        return tuple(None if result is None else result * factor for result in operator(*args, **kwargs))

    name, recorder = "native_layer_norm_backward", OperatorRecorder(torch.device("cpu"), tf32=False)
    torch.set_num_threads(1)
    try:
        with with_fault(name, wrong), recorder.recording():
            out.backward(grad)
    finally:
        torch.set_num_threads(threads)
    assert [call.status for call in recorder.results.values() if call.name == name] == [status]


def test_matmul_in_onednn_layout_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PREFERS_ONEDNN", True), ("_MIN_MULTIPLY_ADDS", 0), ("_ONEDNN_LINEAR", None)):
        monkeypatch.setattr(cpu_ops, name, value)  # what torch 1.12 does on a processor that is not Intel's
    x, weight, bias = torch.randn(12, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    recorder = OperatorRecorder(torch.device("cpu"), tf32=False)
    with recorder.recording():
        cpu_ops.linear(x, weight, bias).sum().backward()
    products = [call.status for call in recorder.results.values() if call.name == "mkldnn_linear"]
    assert products == ["ok", "ok"]  # forward, and the input's gradient
    assert {call.status for call in recorder.results.values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has no fp16 on processors")
@pytest.mark.parametrize("precision", ["amp", "fp16"])
def test_verify_passes_on_cpu_with_loss_scaling(precision: str) -> None:
    assert failed(None, f"precision={precision}") == []


def test_verify_detects_one_percent_error_in_matmul() -> None:
    with with_fault("mm", lambda operator, args, kwargs: operator(*args, **kwargs) * 1.01):
        found = failed()
    assert {name for name, _ in found} == {"operators fp32: mm"}


@pytest.mark.slow
def test_verify_detects_one_wrong_row() -> None:
    def fault(operator: Any, args: Any, kwargs: Any) -> Any:
        out = operator(*args, **kwargs)
        out[-1] = 0.0
        return out

    with with_fault("gelu", fault):
        found = failed_operators()
    assert {name for name, _ in found} == {"operators fp32: gelu"}


@pytest.mark.slow
def test_verify_detects_missing_weight_decay() -> None:
    name = "_fused_adamw_" if not torch.__version__.startswith("1.") else "addcdiv_"

    def fault(operator: Any, args: Any, kwargs: Any) -> Any:
        if name == "addcdiv_":
            return operator(*args, value=0.9 * kwargs["value"])
        if (
            sum(tensor.numel() for tensor in tensors_in(args)) < 100
        ):  # the update that decides whether it is used at all
            return operator(*args, **kwargs)
        return operator(*args, **{**kwargs, "weight_decay": 0.0})

    with with_fault(name, fault):
        found = failed_operators("optimizer.weight_decay=0.5", "lr=1e-2")
    assert {name for name, _ in found} == {f"operators fp32: {name}"}


def test_verify_detects_missing_operator() -> None:
    def fault(operator: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("Could not run 'aten::gelu' with arguments from the 'XPU' backend")

    with with_fault("gelu", fault):
        found = failed_operators()
    assert {name for name, _ in found} == {"operators fp32: gelu"}
    assert all("missing: Could not run" in said for _, said in found)


def test_verify_detects_silent_cpu_fallback() -> None:
    def fault(operator: Any, args: Any, kwargs: Any) -> Any:
        torch.ops.aten._to_cpu(tensors_in(args))  # what torch's own fall-back does first
        return operator(*args, **kwargs)

    with with_fault("native_layer_norm", fault):
        found = failed_operators()
    assert found == [("operators fp32: native_layer_norm", "falls back: its inputs are copied to the CPU")]


def test_verify_detects_ignored_dropout_seed() -> None:
    class IgnoresSeed(CPURuntime):
        def manual_seed(self, seed: int) -> None:
            pass

    assert failures([model_check.check_dropout(IgnoresSeed())]) == [("dropout", "the same seed gives different masks")]


def test_verify_detects_unscaled_dropout() -> None:
    class Unscaled(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            return RuntimeOps(dropout=lambda x, share: F.dropout(x, share) * (1 - share))

    message = "elements that it keeps are multiplied by 1.0000 instead of 1 / (1 - 0.1)"
    assert failures([model_check.check_dropout(Unscaled())]) == [("dropout", message)]


def test_verify_detects_a_different_share_of_zeros() -> None:
    class DropsMore(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            return RuntimeOps(dropout=lambda x, share: F.dropout(x, 2 * share))

    found = model_check.check_dropout(DropsMore())
    assert (found.status, found.message[:9], found.message[-14:]) == ("fail", "drops 0.2", "instead of 0.1")
    assert (found.value, found.bound) == (pytest.approx(0.1, abs=0.003), pytest.approx(0.0018, abs=1e-4))


def test_verify_detects_a_seed_that_is_replaced_by_another() -> None:
    class OneSeed(CPURuntime):
        def manual_seed(self, seed: int) -> None:
            super().manual_seed(4)

    assert failures([model_check.check_dropout(OneSeed())]) == [("dropout", "different seeds give the same mask")]


def test_verify_detects_attention_that_drops_a_different_share(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = DotProductAttention.__call__

    def drops_more(self: Any, q: Any, k: Any, v: Any, mask: Any, share: float) -> torch.Tensor:
        out: torch.Tensor = computed(self, q, k, v, mask, 2 * share)
        return out * (1 - 2 * share) / (1 - share)  # scaled for the share that was requested

    monkeypatch.setattr(DotProductAttention, "__call__", drops_more)
    found = model_check.check_dropout(CPURuntime())
    assert found.status == "fail"
    assert found.message.startswith("attention in float32: its mean with dropout 0.1 is 0.8")


class _DifferentBackwardMask(torch.autograd.Function):
    """Dropout whose backward pass draws zeros of its own."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.1)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return F.dropout(gradients[0], 0.1)


def test_verify_detects_different_dropout_mask_in_backward() -> None:
    class Other(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            return RuntimeOps(dropout=lambda x, share: _DifferentBackwardMask.apply(x))

    message = "dropout: the gradient has other zeros than the output"
    assert failures([model_check.check_dropout(Other())]) == [("dropout", message)]


def test_verify_detects_different_dropout_mask_in_recomputation() -> None:
    class Other(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            def checkpoint(function: Any, *args: Any) -> Any:
                return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True, preserve_rng_state=False)

            return RuntimeOps(checkpoint=checkpoint)

    message = (
        "activation checkpointing: dropout in the repeated forward pass: the gradient has other zeros than the output"
    )
    assert failures([model_check.check_dropout(Other())]) == [("dropout", message)]


def test_verify_detects_different_attention_dropout_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = DotProductAttention.__call__

    def other(self: Any, q: Any, k: Any, v: Any, mask: Any, share: float) -> torch.Tensor:
        with torch.no_grad():
            value: torch.Tensor = computed(self, q, k, v, mask, share)
        linear: torch.Tensor = computed(self, q, k, v, mask, share)
        return value + linear - linear.detach()

    monkeypatch.setattr(DotProductAttention, "__call__", other)
    found = model_check.check_dropout(CPURuntime())
    assert (found.status, found.message) == (
        "fail",
        "attention with dropout: the gradient has other zeros than the output",
    )


def test_verify_detects_wrong_argmax() -> None:
    with with_fault("argmax", lambda operator, args, kwargs: (operator(*args, **kwargs) + 1) % 3):
        found = failed_operators()
    assert {name for name, _ in found} == {"operators fp32: argmax"}


def test_wrong_softmax_does_not_fail_the_dropout_check(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = DotProductAttention.__call__
    means = []

    def scaled(*args: Any) -> torch.Tensor:
        out: torch.Tensor = 1.1 * computed(*args)
        means.append(float(out.float().mean()))
        return out

    monkeypatch.setattr(DotProductAttention, "__call__", scaled)
    assert model_check.check_dropout(CPURuntime()).status == "ok"
    assert means[:4] == pytest.approx([1.1] * 4, abs=0.01)


def test_verify_detects_non_blocking_synchronize() -> None:
    """An asynchronous device: a product is done some time after its call has come back; who reads waits for it."""
    done_at = [0.0]

    class NonBlocking(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            def linear(x: Any, weight: Any, bias: Any) -> Any:
                if bias is None and x.shape == weight.shape:  # the square products of the clock
                    done_at[0] = max(done_at[0], time.perf_counter()) + 0.004
                    return x
                return F.linear(x, weight, bias)

            return RuntimeOps(linear=linear)

        def synchronize(self) -> None:
            pass

    def reading(operator: Any, args: Any, kwargs: Any) -> Any:
        time.sleep(max(0.0, done_at[0] - time.perf_counter()))
        return operator(*args, **kwargs)

    with with_fault("_local_scalar_dense", reading):
        found = timing_check.check_clock(NonBlocking())
    assert (found.name, found.status) == ("clock", "fail")


@pytest.mark.parametrize(
    ("peak", "status", "share"), [(10.0, "fail", "500%"), (100.0, "ok", "50%"), (1000.0, "warn", "5%")]
)
def test_speed_is_compared_with_the_stated_peak(
    peak: float, status: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_check, "measure_matmul", lambda *_: (50.0, 256))
    (found,) = timing_check.check_speed(configuration(), CPURuntime(), torch.float32, peak, "fp32")
    message = f"50 TFLOP/s (256 x 256), {share} of hardware.peak_tflops.fp32={peak:g}"
    assert (found.name, found.status, found.message) == ("speed fp32", status, message)


def test_speed_counts_the_operations_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond for each product of two matrices of 256 x 256, the only size that the fixture leaves."""
    monkeypatch.setattr(timing_check.ChainedMatmuls, "seconds", lambda _self, count: (0.0008 * count, 0.0002 * count))
    fastest, size = timing_check.measure_matmul(CPURuntime(), torch.float32)
    assert (fastest, size) == (pytest.approx(2 * 256**3 / 0.001 / 1e12), 256)


def test_a_clock_that_does_not_count_the_work_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_check.ChainedMatmuls, "seconds", lambda _self, _count: (0.5, 0.0))
    found = timing_check.check_clock(CPURuntime())
    assert (found.status, found.message) == ("warn", "time does not scale with work (2x work: 1.00x time)")


def test_a_check_that_raises_fails_the_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_runtime: Any) -> CheckResult:
        raise ValueError("the driver\nis gone")

    monkeypatch.setattr(timing_check, "check_clock", broken)
    monkeypatch.setattr(timing_check, "check_bandwidth", lambda _: [])
    monkeypatch.setattr(model_check, "check_dropout", lambda _: CheckResult("dropout", "ok", ""))
    test = acceptance.AcceptanceTest([configuration()], CPURuntime(), full_model=False)
    monkeypatch.setattr(test, "_check_precision", lambda _: iter([CheckResult("operators fp32", "ok", "")]))
    assert failures(test.checks()) == [("clock", "ValueError: the driver is gone")]
    assert test.passed == {"fp32": False}


def test_a_missing_operator_leaves_the_model_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = small_configuration()

    def gelu_is_missing(*arguments: Any) -> List[CheckResult]:
        arguments[-1].append(OperatorResult("gelu", "", "missing"))
        return [CheckResult("operators fp32: gelu", "fail", "missing")]

    monkeypatch.setattr(acceptance, "_check_operators", gelu_is_missing)
    test = acceptance.AcceptanceTest([config], CPURuntime(), full_model=False)
    found = [(check.name, check.status, check.message) for check in test._check_precision(config)][:2]
    assert found[0][:2] == ("operators fp32: gelu", "fail")
    assert found[1] == ("model fp32", "skip", "not checked: it needs gelu")


def test_collectives_that_fail_on_a_rank_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank_1_is_wrong(*_: Any) -> None:
        raise RunError("rank 1 failed: ...", summary="all-reduce of 7 float32 over 2 ranks is wrong on rank 1")

    monkeypatch.setattr(collectives_check, "run_on_all_ranks", rank_1_is_wrong)
    found = collectives_check.check_collectives(configuration("topology=1x2"))
    assert (found.status, found.message) == ("fail", "all-reduce of 7 float32 over 2 ranks is wrong on rank 1")


def test_a_wrong_layer_is_named_where_each_operator_is_right() -> None:
    class Scaled(CPURuntime):
        def model_ops(self) -> RuntimeOps:
            return RuntimeOps(linear=lambda x, weight, bias: F.linear(x, weight, bias) * 1.01)

    config, fixture = small_configuration()
    assert failures(acceptance._check_operators(config, fixture, Scaled(), False, [])) == []
    found = failures(model_check.check_layers(config, fixture, Scaled(), tf32=False))
    assert ("model fp32", "first deviation: layer 0") in found


_SUM_FAULTS = ["sum drops a rank", "sum rounds to bf16", "sum of many is wrong at its end"]


@pytest.mark.parametrize("fault", ["none", *_SUM_FAULTS, "broadcast does nothing", "gather swaps ranks"])
def test_a_collective_that_is_wrong_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 3

    def given(of: int, like: torch.Tensor) -> torch.Tensor:
        return collectives_check.rank_contribution(like.dtype, of, ranks, "cpu", like.numel())

    def all_reduce(tensor: Any) -> None:
        counted = ranks - 1 if fault == "sum drops a rank" else ranks
        tensor.copy_(sum(given(of, tensor) for of in range(counted)))
        if fault == "sum rounds to bf16" and tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
        if fault == "sum of many is wrong at its end" and tensor.numel() > 200_000:
            tensor[-1] = 0

    def broadcast(tensor: Any, source: int) -> None:
        if fault != "broadcast does nothing":
            tensor.copy_(given(source, tensor))

    def all_gather(out: Any, tensor: Any) -> None:
        order = [1, 0, 2] if fault == "gather swaps ranks" else [0, 1, 2]
        for place, of in zip(out, order):
            place.copy_(given(of, tensor))

    for name, double in (("all_reduce", all_reduce), ("broadcast", broadcast), ("all_gather", all_gather)):
        monkeypatch.setattr(torch.distributed, name, double)
    wrong = collectives_check.run_collectives(0, ranks, torch.device("cpu"), [torch.float32, torch.int64, torch.uint8])
    words = {
        "none": "",
        **dict.fromkeys(_SUM_FAULTS, "all-reduce"),
        "broadcast does nothing": "broadcast",
        "gather swaps ranks": "gather",
    }
    assert bool(wrong) == (fault != "none")
    assert all(words[fault] in line for line in wrong)
