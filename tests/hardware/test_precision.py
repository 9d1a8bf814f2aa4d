"""Each precision by the type of what is computed, through the command that users type."""

import signal
from pathlib import Path
from typing import Any, Set

import pytest
import torch

from conftest import GOLDEN_RUN, lit_glm, lit_glm_here, rows
from lit_glm.config.schema import LossScaleConfig
from lit_glm.hardware.precision import FP16Precision
from lit_glm.hardware.runtimes import cpu
from lit_glm.model.glm import Linear
from runs.test_runs import DEBUG, _assert_same_results, _start, _wait_for_steps, result

NEW = not torch.__version__.startswith("1.")
needs_half = pytest.mark.skipif(not NEW, reason="torch 1.12 has no fp16 products on the processor")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float16, "fp16": torch.float16}
WEIGHTS = {"fp32": torch.float32, "bf16": torch.float32, "amp": torch.float32, "fp16": torch.float16}


@pytest.mark.parametrize(
    "precision",
    ["fp32", "bf16", pytest.param("amp", marks=[needs_half, pytest.mark.slow]), pytest.param("fp16", marks=needs_half)],
)
def test_dtypes_of_compute_weights_and_moments_per_precision(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: Set[Any] = set()
    weights: Set[Any] = set()
    moments: Set[Any] = set()
    forward, step = Linear.forward, torch.optim.AdamW.step

    def spy(self: Linear, x: Any) -> Any:
        out = forward(self, x)
        products.add(out.dtype)
        weights.add(self.weight.dtype)
        return out

    def spy_step(self: Any, *arguments: Any, **keys: Any) -> Any:
        done = step(self, *arguments, **keys)
        moments.update(state["exp_avg"].dtype for state in self.state.values())
        return done

    monkeypatch.setattr(Linear, "forward", spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    run = tmp_path / "run"
    scaled = precision in ("amp", "fp16")
    scaling = ["precision.loss_scale.initial=1024"] if scaled else []  # low enough for no overflow here
    overrides = [f"precision={precision}", *scaling, "run.max_steps=3", f"hydra.run.dir={run}"]
    assert lit_glm_here("train", *GOLDEN_RUN, *overrides) == 0
    assert products == {TYPES[precision]}
    assert weights == {WEIGHTS[precision]}
    assert moments == {torch.float32}
    scales = {row["loss_scale"] for row in rows(run / "steps.csv")}
    assert scales == ({"1024.0"} if scaled else {""})
    assert list(rows(run / "steps.csv")[0])[-1] == "loss_scale"


def test_cpu_without_bf16_instructions_gives_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: ["AMX tiles"])
    monkeypatch.setattr(cpu, "accumulates_bf16_in_fp32", lambda: True)
    assert cpu.CPURuntime().precision_hint("bf16") == ""
    monkeypatch.setattr(cpu, "bf16_instructions", list)
    assert "no bf16 units" in cpu.CPURuntime().precision_hint("bf16")
    monkeypatch.setattr(cpu, "accumulates_bf16_in_fp32", lambda: False)
    assert "accumulates bf16 products in bf16" in cpu.CPURuntime().precision_hint("bf16")
    assert cpu.CPURuntime().precision_hint("fp32") == ""


@pytest.mark.skipif(NEW, reason="today's torch computes fp16 on the processor")
@pytest.mark.parametrize("precision", ["amp", "fp16"])
def test_fp16_on_unsupported_cpu_is_rejected_at_start(precision: str, tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *GOLDEN_RUN, f"precision={precision}", f"hydra.run.dir={tmp_path}") == 2
    assert f"precision={precision}: not supported by runtime cpu with torch" in capfd.readouterr().err


def test_precision_not_listed_in_the_hardware_file_is_rejected(tmp_path: Path, capfd: Any) -> None:
    chip = ["hardware=r300", "hardware.runtime=simulated", "precision=bf16"]
    assert lit_glm_here("train", *GOLDEN_RUN, *chip, f"hydra.run.dir={tmp_path}") == 2
    assert "precision=bf16: not supported by R300; supported: fp32, amp, fp16" in capfd.readouterr().err


@needs_half
@pytest.mark.parametrize("precision", [pytest.param("amp", marks=pytest.mark.slow), "fp16"])
def test_overflow_skips_the_step_and_halves_the_scale(precision: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    scaling = ["precision.loss_scale.initial=1e9", "precision.loss_scale.hysteresis=1", "run.max_steps=12"]
    assert lit_glm_here("train", *GOLDEN_RUN, f"precision={precision}", *scaling, f"hydra.run.dir={run}") == 0
    steps = rows(run / "steps.csv")
    left_out = [row for row in steps if row["grad_norm"] == ""]
    assert 0 < len(left_out) < 12
    assert result(run)["skipped_steps"] == len(left_out)
    scales = [float(row["loss_scale"]) for row in steps]
    for before, after, row in zip(scales, scales[1:], steps):
        assert after == (before / 2 if row["grad_norm"] == "" else before)
    # A step that is left out does not move the schedule.
    assert float(next(row["lr"] for row in steps if row["lr"])) == 0.0


@needs_half
@pytest.mark.slow
def test_resumed_fp16_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """The masters and the scale are in the checkpoint."""
    how = ["precision=fp16", "precision.loss_scale.initial=1e8", "data.num_workers=0", "run.max_steps=20"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert lit_glm("train", *DEBUG, *how, f"hydra.run.dir={whole}", cwd=tmp_path).returncode == 0
    process = _start(tmp_path, run, "1x1", *how)
    _wait_for_steps(run, process, 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    again = lit_glm("train", *DEBUG, *how, f"run.resume={run}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [row["loss_scale"] for row in rows(run / "steps.csv")] == [
        row["loss_scale"] for row in rows(whole / "steps.csv")
    ]
    _assert_same_results(run, whole, tmp_path)


@pytest.mark.unit
def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """In fp16 the second one would be lost beside the first."""
    plugin = FP16Precision(LossScaleConfig())
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    plugin.wrap_optimizers([optimizer])
    for gradient in (1.0, 2.0**-12):
        weight.grad = torch.full((1,), gradient, dtype=torch.float16)
        plugin.unscale_(optimizer)
    (master,) = optimizer.param_groups[0]["params"]
    assert master.grad.item() * plugin.loss_scale == 1.0 + 2.0**-12
