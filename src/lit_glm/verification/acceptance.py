"""Acceptance test of a device: runs all checks, and relates failures to operators that already failed."""

import itertools
import math
import platform
import time
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.precision import make_precision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import computes_on_cpu
from lit_glm.launch.signals import reraise_interruption
from lit_glm.metrics.flops import peak_key
from lit_glm.verification import collectives_check, model_check, timing_check
from lit_glm.verification.operator_check import OperatorRecorder, OperatorResult, find_cpu_fallbacks
from lit_glm.verification.stepper import TrainStepper, VerifyFixture, make_fixture

_NARROW = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "max_sequence_length": 128,
}
_SLOW_TFLOPS = 5.0
"""A device with less fp32 matmul throughput gets a model cut to two narrow layers; the full one would take an hour."""
_ADVICE = {
    "differs": "compare with the model checks below: if those deviate too, the device computes it wrongly",
    "missing": "not implemented by the device's software: use a newer version, or another runtime of the device",
    "fails": "the operator exists and raised this error: see the runtime's documentation for these shapes",
    "falls back": "it runs on the CPU, with copies in both directions: its time is not the device's",
}


class AcceptanceTest:
    """All verification checks of a device."""

    def __init__(
        self, configurations: List[TrainConfig], runtime: Runtime, full_model: bool, limit_s: float = math.inf
    ) -> None:
        """Cut the model if the device is slow.

        Args:
            configurations: one per precision.
            runtime: runtime of the device.
            full_model: use the full model, even on a slow device.
            limit_s: seconds after which no further check starts.
        """
        self.configurations, self._runtime = configurations, runtime
        self._end, self._limit_s = time.monotonic() + limit_s, limit_s
        self._is_reduced = not full_model and timing_check.measure_matmul(runtime, torch.float32)[0] < _SLOW_TFLOPS
        if self._is_reduced:
            length = _NARROW["max_sequence_length"]
            self.configurations = [
                replace(full, model=replace(full.model, **_NARROW), data=replace(full.data, max_seq_length=length))  # type: ignore[arg-type]
                for full in configurations
            ]
        self._has_timed_out = False
        self.done: List[CheckResult] = []
        self.passed: Dict[str, bool] = {}
        """Verdict of each precision that was tested; includes the checks that belong to no precision."""

    def title(self) -> str:
        """Describe what will be verified."""
        config, model = self.configurations[0], self.configurations[0].model
        cut = "cut to " if self._is_reduced else ""
        precisions = ", ".join(configuration.precision.name for configuration in self.configurations)
        return (
            f"{self._runtime.name} for {config.hardware.name}, {precisions}; "
            f"{model.name} {cut}{model.num_layers} x {model.hidden_size}, {config.data.max_seq_length} tokens"
        )

    def device(self) -> Dict[str, Any]:
        """Describe device and software of the verification."""
        config, runtime = self.configurations[0], self._runtime
        return {
            "hardware": config.hardware.name,
            "topology": config.topology.name,
            "runtime": runtime.name,
            "simulated": runtime.simulated,
            "computed_on_cpu": computes_on_cpu(config.hardware, runtime),
            "driver": config.report.driver or runtime.driver_version(),
            "device_name": runtime.device_name(0),
            "host": platform.node(),
            "torch": torch.__version__,
        }

    def checks(self) -> Iterator[CheckResult]:
        """Run all checks, the shortest first."""
        config, runtime = self.configurations[0], self._runtime
        general_failure = False
        for name, run in (
            ("clock", lambda: [timing_check.check_clock(runtime)]),
            ("bandwidth", lambda: timing_check.check_bandwidth(runtime)),
            ("dropout", lambda: [model_check.check_dropout(runtime)]),
            ("collectives", lambda: [collectives_check.check_collectives(config)]),
        ):
            for check in self._run(name, run):
                self.done.append(check)
                general_failure = general_failure or check.status == "fail"
                yield check
        for config in self.configurations:
            precision_checks: List[CheckResult] = []
            for check in self._check_precision(config):
                precision_checks.append(check)
                self.done.append(check)
                yield check
            if any(check.status != "skip" for check in precision_checks) and not self._has_timed_out:
                fails = general_failure or any(check.status == "fail" for check in precision_checks)
                self.passed[config.precision.name] = not fails

    def _run(self, name: str, run: Callable[[], List[CheckResult]]) -> List[CheckResult]:
        """Run a check; an exception becomes a failure, and an expired time limit a skip."""
        if time.monotonic() > self._end:
            self._has_timed_out = True
            message = f"not checked: verify.max_minutes={self._limit_s / 60:g} exceeded"
            return [CheckResult(name, "skip", message)]
        try:
            with reraise_interruption():
                return run()
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            return [CheckResult(name, "fail", f"{type(error).__name__}: {text}")]

    def _check_precision(self, config: TrainConfig) -> Iterator[CheckResult]:
        name, runtime = config.precision.name, self._runtime
        try:
            plugin: Any = make_precision(
                config, runtime, check_on_device=name != "fp32"
            )  # fp32 is checked by operator below
        except InputError as error:
            first = str(error).splitlines()[0]
            yield CheckResult(
                f"precision {name}", "skip", first, advice="remove it from the hardware file's precisions"
            )
            return
        which = peak_key(config, runtime.has_tf32)
        tf32 = which == "tf32"
        fixture = make_fixture(config)
        results: List[OperatorResult] = []
        yield from self._run(f"operators {name}", lambda: _check_operators(config, fixture, runtime, tf32, results))
        wrong = sorted({result.name for result in results if result.status in ("differs", "missing", "fails")})
        if any(result.status in ("missing", "fails") for result in results):
            yield CheckResult(f"model {name}", "skip", f"not checked: it needs {', '.join(wrong)}")
        else:
            for check in self._run(f"model {name}", lambda: model_check.check_layers(config, fixture, runtime, tf32)):
                yield _downgrade_consequence(check, wrong)
            for check in self._run(
                f"training {name}", lambda: model_check.check_training(config, fixture, runtime, tf32)
            ):
                yield _downgrade_consequence(check, wrong)
        peak = config.hardware.peak_tflops.get(which)
        yield from self._run(
            f"speed {name}", lambda: timing_check.check_speed(config, runtime, plugin.computes_in, peak, which)
        )


def _downgrade_consequence(check: CheckResult, wrong: List[str]) -> CheckResult:
    """Downgrade a failure that a wrong operator already explains to a warning."""
    if check.status == "fail" and wrong:
        names = ", ".join(wrong)
        advice = f"explained by {names} above, which the device computes wrongly: report that to its vendor"
        return replace(check, status="warn", advice=advice)
    return check


def _check_operators(
    config: TrainConfig, fixture: VerifyFixture, runtime: Runtime, tf32: bool, results: List[OperatorResult]
) -> List[CheckResult]:
    """Check the operators of a training step and an evaluation per scoring; one result per wrong operator."""
    model = replace(
        fixture.model, hidden_dropout=config.model.hidden_dropout, attention_dropout=config.model.attention_dropout
    )
    operators = OperatorRecorder(runtime.device(0), tf32)
    fallbacks: List[Any] = []
    # Without dropout too: a fused attention that draws has no result to compare with.
    models = [fixture.model] if model == fixture.model else [model, fixture.model]
    for scoring_model, batch in itertools.product(models, (fixture.packed, fixture.padded)):
        stepper = TrainStepper(config, replace(fixture, model=scoring_model), runtime)
        with operators.recording():
            stepper.train(batch)
            stepper.evaluate(batch)
        if not any(result.status in ("missing", "fails") for result in operators.results.values()):
            fallbacks += find_cpu_fallbacks(lambda: (stepper.train(batch), stepper.evaluate(batch)))  # noqa: B023
    results += operators.results.values()
    for name, text in dict(fallbacks).items():
        if not any(result.name == name and result.status == "falls back" for result in results):
            results.append(OperatorResult(name, "", "falls back", message=text))
    label = f"operators {config.precision.name}"
    checks = []
    for result in results:
        if result.status in _ADVICE:
            reason = f": {result.message}" if result.message else ""
            shapes = f" ({result.shapes})" if result.shapes else ""
            message = f"{result.status}{reason}{shapes}"
            value, bound = (result.error.typical, result.bound) if result.status == "differs" else (None, None)
            checks.append(CheckResult(f"{label}: {result.name}", "fail", message, _ADVICE[result.status], value, bound))
    unknown = sorted({result.name for result in results if result.status == "unknown"})
    if unknown:
        text = f"{', '.join(unknown)}: no reference to compare with"
        checks.append(CheckResult(f"{label}: unknown", "warn", text, advice="covered by the model checks below"))
    good = [result for result in results if result.status == "ok"]
    nearest = max(good, key=lambda result: result.error.typical / (result.bound or 1.0), default=None)
    if nearest is not None:
        drawn = sum(result.status == "drawn" for result in results)
        names = {result.name for result in good}
        text = f"{len(names)} operators ({len(good)} shapes) agree, {drawn} random; closest to bound: {nearest.name}"
        checks.append(CheckResult(label, "ok", text, value=nearest.error.typical, bound=nearest.bound))
    return checks
