"""Devices that compute late, keep states on the host, or leave out what nobody needs: right ones pass, others fail."""

import time
import weakref
from typing import Any, List

import pytest
import torch
import torch.nn.functional as F

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.model.runtime_ops import RuntimeOps
from lit_glm.verification import acceptance, timing_check
from lit_glm.verification.operator_check import OperatorRecorder, find_cpu_fallbacks, reference_result


class LazyTensor:
    """A double of a lazy device's tensor: a product that is computed when it is asked for, or never."""

    live: "weakref.WeakSet[LazyTensor]" = weakref.WeakSet()
    computed = 0

    def __init__(self, *arguments: Any) -> None:
        self.arguments: Any = arguments
        self.value: Any = None
        LazyTensor.live.add(self)

    def now(self) -> torch.Tensor:
        if self.value is None:
            chain, node = [], self
            while isinstance(node, LazyTensor) and node.value is None:
                chain.append(node)
                node = node.arguments[0]
            value: Any = node.value if isinstance(node, LazyTensor) else node
            for one in reversed(chain):
                value = one.value = F.linear(value, *one.arguments[1:])
                LazyTensor.computed += 1
        return torch.as_tensor(self.value)

    def __getitem__(self, place: Any) -> Any:
        return self.now()[place]


class LazyRuntime(CPURuntime):
    name = "lazy"

    def model_ops(self) -> RuntimeOps:
        return RuntimeOps(checkpoint=self.checkpoint(), linear=LazyTensor)  # type: ignore[arg-type]

    def synchronize(self) -> None:
        for one in list(LazyTensor.live):
            one.now()


class NonBlockingRuntime(LazyRuntime):
    """Its synchronize does nothing: work is done when a value is read."""

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_check, "_AT_LEAST_S", 0.05)
    monkeypatch.setattr(timing_check, "_SIZES", (256, 512))
    monkeypatch.setattr(timing_check, "_BYTES", (2**20, 2**20))


@pytest.mark.process
def test_clock_check_of_a_lazy_device_uses_completed_work() -> None:
    assert timing_check.check_clock(LazyRuntime()).status in ("ok", "warn")  # warn: while other processes run
    wrong = timing_check.check_clock(NonBlockingRuntime())
    assert wrong.status == "fail"
    assert "passes after synchronize" in wrong.message


def test_speed_of_a_lazy_device_counts_only_computed_matmuls() -> None:
    config = validate_config(compose_config("train", ["precision=fp32"]), TrainConfig)
    LazyTensor.computed, begun = 0, time.perf_counter()
    (check,) = timing_check.check_speed(config, LazyRuntime(), torch.float32, None, "fp32")
    took = time.perf_counter() - begun
    assert check.value is not None
    assert check.value * 1e12 <= 2.0 * 512**3 * LazyTensor.computed / took * 20
    assert check.value < 20  # no processor computes fp32 faster


def seen(operator: Any, *arguments: Any) -> List[str]:
    recorder = OperatorRecorder(torch.device("cpu"), False)
    recorder._check_call(operator, arguments, {})
    return [result.status for result in recorder.results.values()]


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has no library of operators for this")
def test_rng_state_outputs_on_host_are_not_a_cpu_fallback() -> None:
    library = torch.library.Library("lit_glm_demo", "DEF")
    schema = "(Tensor q, Tensor k, Tensor v, Tensor? b, bool c) -> (Tensor, Tensor, Tensor, Tensor)"
    library.define(f"_scaled_dot_product_efficient_attention{schema}")

    def attention(q: Any, k: Any, v: Any, b: Any, c: Any) -> Any:
        seed = torch.empty((), dtype=torch.long, device="meta")
        return F.scaled_dot_product_attention(q, k, v, b), q.sum(-1), seed, seed

    library.impl("_scaled_dot_product_efficient_attention", attention, "CPU")
    operator = torch.ops.lit_glm_demo._scaled_dot_product_efficient_attention.default
    q = torch.randn(1, 2, 4, 8)
    assert seen(operator, q, q, q, None, False) == ["ok"]
    assert seen(operator, q, q, q, torch.randn(4, 4), False) == ["ok"]


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has none of these operators")
@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_cudnn_attention",
    ],
)
def test_a_mask_is_found_by_the_operators_schema(name: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    right = F.scaled_dot_product_attention(q, k, v, mask)
    forward = getattr(torch.ops.aten, name).default
    (out,) = reference_result(name, forward, (q, k, v, mask), {})
    torch.testing.assert_close(out, right)
    grad = torch.randn_like(right)
    expected = torch.autograd.grad(right, (q, k, v), grad)
    backward = getattr(torch.ops.aten, f"{name}_backward").default
    names = [argument.name for argument in backward._schema.arguments]
    given = {"query": q, "key": k, "value": v, "attn_bias": mask}
    arguments = [grad, *(given.get(key) for key in names[1 : names.index("attn_bias") + 1])]
    for ours, theirs in zip(reference_result(f"{name}_backward", backward, arguments, {}), expected):
        torch.testing.assert_close(ours, theirs)


class Other:
    """A double of an operator of aten that computes something else in anything but float64."""

    def __init__(self, name: str, change: Any) -> None:
        self.real, self.change = getattr(torch.ops.aten, name).default, change
        self._schema = self.real._schema

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.real(*args, **kwargs)
        exact = any(isinstance(arg, torch.Tensor) and arg.dtype is torch.float64 for arg in args)
        return out if exact else self.change(out)

    def __str__(self) -> str:
        return str(self.real)


def test_loss_output_saved_for_backward_is_not_compared() -> None:
    arguments = (torch.randn(2, 3).log_softmax(1), torch.tensor([0, 2]), None, 1, -100)
    assert seen(Other("nll_loss_forward", lambda out: (out[0], torch.ones_like(out[1]))), *arguments) == ["ok"]
    assert seen(Other("nll_loss_forward", lambda out: (out[0] * 1.1, out[1])), *arguments) == ["differs"]


def test_an_operator_that_raises_is_not_one_that_is_missing() -> None:
    def raises(text: str) -> Any:
        def change(out: Any) -> Any:
            raise RuntimeError(text)

        return change

    x = torch.randn(3)
    assert seen(Other("relu", raises("out of resources")), x) == ["fails"]
    assert seen(Other("relu", raises("Could not run 'aten::relu' with arguments from the 'X' backend")), x) == [
        "missing"
    ]


def test_a_fall_back_does_not_hide_a_wrong_result() -> None:
    def elsewhere(out: torch.Tensor) -> torch.Tensor:
        import warnings

        warnings.warn("aten::relu falls back to the CPU", stacklevel=1)
        return out + 1.0

    assert sorted(seen(Other("relu", elsewhere), torch.randn(9))) == ["differs", "falls back"]


def test_reading_a_scalar_is_not_a_cpu_fallback() -> None:
    def read() -> None:
        with torch.profiler.record_function("aten::_local_scalar_dense"):
            torch.ops.aten._to_cpu([torch.ones(1)])

    def other() -> None:
        torch.ops.aten._to_cpu([torch.ones(1)])

    assert find_cpu_fallbacks(read) == []
    assert len(find_cpu_fallbacks(other)) == 1


def test_checks_after_the_time_limit_are_skipped() -> None:
    config = validate_config(compose_config("train", ["precision=fp32"]), TrainConfig)
    late = acceptance.AcceptanceTest([config], CPURuntime(), full_model=False, limit_s=0.0)
    checks = list(late.checks())
    assert {check.status for check in checks} == {"skip"}
    assert "verify.max_minutes=0 exceeded" in checks[0].message
    assert late.passed == {}
