"""The rule of the loss scale, against a second statement of it."""

import importlib.util
from pathlib import Path
from typing import Any, List

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import LossScaleConfig, TrainConfig
from lit_glm.hardware.precision import AMPPrecision, DynamicLossScale
from lit_glm.hardware.runtimes.cpu import CPURuntime

DOUBLE = Path(__file__).parent.parent / "doubles" / "torch_xmlir" / "amp" / "__init__.py"


def scales(overflows: List[bool], config: LossScaleConfig) -> List[float]:
    scale = DynamicLossScale(config)
    found = []
    for overflow in overflows:
        scale.update(overflow)
        found.append(scale.get_scale())
    return found


def test_hysteresis_delays_halving_of_the_loss_scale() -> None:
    config = LossScaleConfig(initial=64, window=3, hysteresis=2, minimum=1)
    assert scales([True, True, True], config) == [64, 32, 16]
    # The allowance is renewed when the scale doubles, not by a single good step.
    assert scales([True, False, True, False, False, False, True, True], config) == [64, 64, 32, 32, 32, 64, 64, 32]


def test_it_never_falls_below_the_minimum() -> None:
    assert scales([True] * 9, LossScaleConfig(initial=8, window=1000, hysteresis=2, minimum=2))[-3:] == [2, 2, 2]


@given(
    overflows=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
)
def test_loss_scale_matches_the_megatron_rule(overflows: List[bool], window: int, hysteresis: int) -> None:
    """Megatron's counters, as its code states them: iterations since the last overflow, and an allowance."""
    scale, allowance, last_overflow, expected = 256.0, hysteresis, -1, []
    for iteration, overflow in enumerate(overflows):
        if overflow:
            if hysteresis == 1 or allowance == 1:
                scale = max(scale / 2, 1.0)
            else:
                allowance -= 1
            last_overflow = iteration
        elif (iteration - last_overflow) % window == 0:
            allowance = hysteresis
            scale *= 2
        expected.append(scale)
    config = LossScaleConfig(initial=256, window=window, hysteresis=hysteresis, minimum=1)
    assert scales(overflows, config) == expected


def test_restored_loss_scale_continues_identically() -> None:
    config = LossScaleConfig(initial=64, window=3, hysteresis=2, minimum=1)
    one, other = DynamicLossScale(config), DynamicLossScale(config)
    for overflow in (True, False, False):
        one.update(overflow)
    other.load_state_dict(one.state_dict())
    for overflow in (False, True, True, False):
        one.update(overflow)
        other.update(overflow)
        assert one.get_scale() == pytest.approx(other.get_scale())


def test_runtime_loss_scaler_replaces_the_default() -> None:
    """The double halves at once at an overflow and doubles after `window` good steps; a checkpoint has its state."""
    spec = importlib.util.spec_from_file_location("double", str(DOUBLE))
    assert spec is not None
    double: Any = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(double)

    runtime: Any = CPURuntime()
    runtime.loss_scaler = lambda config: double.GradScaler(init_scale=config.initial, growth_interval=config.window)

    def step(plugin: AMPPrecision, value: float) -> float:
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        plugin.scaler.scale((weight * value).sum()).backward()
        plugin.unscale_(optimizer)
        assert weight.grad is not None
        plugin.update_scale(weight.grad)
        return float(weight.grad)

    plugin = AMPPrecision(runtime, LossScaleConfig(initial=8.0, window=2))
    assert step(plugin, 3.0) == 3.0  # divided by what it was multiplied with
    assert step(plugin, float("inf")) == float("inf")
    assert plugin.loss_scale == 4.0
    step(plugin, 1.0)
    other = AMPPrecision(runtime, LossScaleConfig(initial=1.0, window=2))
    other.load_state_dict(plugin.state_dict())
    for each in (plugin, other):
        step(each, 1.0)
        assert each.loss_scale == 8.0


@pytest.mark.parametrize("precision", ["fp16", "amp"])
def test_loss_scale_config_matches_published_values(precision: str) -> None:
    scaling = validate_config(compose_config("train", [f"precision={precision}"]), TrainConfig).precision.loss_scale
    assert scaling is not None
    assert (scaling.window, scaling.hysteresis, scaling.minimum) == (1000, 2, 1)
