"""The command, its file, and who reads it."""

import json
import math
import re
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from conftest import lit_glm, lit_glm_here
from lit_glm.check_result import CheckResult
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.runs import environment
from lit_glm.verification import acceptance, timing_check
from lit_glm.verification.error_bounds import operator_bound, relative_error


@pytest.mark.slow
def test_verify_writes_json_and_prints_one_line_per_check(tmp_path: Path) -> None:
    done = lit_glm("verify", "topology=1x2", "precision=fp32", "model=glm_tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("outputs/verify/*/*/verify.json")
    content = json.loads(file.read_text())
    assert (content["ok"], content["hardware"], content["precisions"]) == (True, "cpu", {"fp32": True})
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "-", "warn", "FAIL"))]
    assert len(lines) == len(content["checks"])
    for name in ("operators", "model", "gradients", "training", "repeatable", "speed"):
        assert any(line.startswith(f"ok    {name} fp32: ") for line in lines), name
    assert "ok    collectives: all-reduce, broadcast, all-gather" in done.stdout
    report = lit_glm("report", ".", cwd=tmp_path)
    assert "contains no run" in report.stderr  # a verification is none


def test_verify_with_wrong_peak_exits_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(timing_check, "_AT_LEAST_S", 0.01)
    monkeypatch.chdir(tmp_path)
    own = ["precision=fp32", "hardware.peak_tflops.fp32=0.001", "model=glm_tiny", "data.max_seq_length=64", "--json"]
    status = lit_glm_here("verify", *own)
    content = json.loads(capfd.readouterr().out)
    assert (status, content["ok"], content["precisions"]) == (1, False, {"fp32": False})
    assert [check["name"] for check in content["checks"] if check["status"] == "fail"] == ["speed fp32"]


@pytest.mark.slow
def test_verify_sweep_writes_one_file_per_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("verify", "-m", "precision=fp32,fp16", "verify.max_minutes=0.0001") == 0
    tables = [json.loads(file.read_text())["checks"] for file in sorted(tmp_path.glob("outputs/verify/*/*/?/*.json"))]
    assert [checks[-1]["name"].split()[-1] for checks in tables] == ["fp32", "fp16"]
    assert not list(tmp_path.rglob("jobs"))  # only `train` keeps records of jobs


@pytest.mark.parametrize(
    ("hardware", "driver", "precision", "found"),
    [("a", "1", "fp32", "new"), ("a", "2", "fp32", None), ("b", "1", "fp32", None), ("a", "1", "bf16", None)],
)
def test_latest_verification_matches_hardware_driver_and_precision(
    hardware: str, driver: str, precision: str, found: Optional[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, moment in (("new", "2026-02-01T00:00:00"), ("old", "2026-01-01T00:00:00")):
        monkeypatch.setattr(environment.time, "strftime", lambda _form, moment=moment: moment)
        environment.write_verification(
            tmp_path / "outputs" / "verify" / "day" / name,
            {"hardware": "a", "driver": "1", "which": name},
            [CheckResult("clock", "ok", "waits")],
            {"fp32": name == "new"},
        )
    run = tmp_path / "outputs" / "2026-02-02" / "10-00-00"
    run.mkdir(parents=True)
    newest: Any = environment.latest_verification([run], hardware, driver, precision)
    assert (newest and newest["which"]) == found
    assert found is None or newest["passed"]


def test_train_says_whether_the_driver_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CPURuntime, "has_driver", True)
    monkeypatch.setattr(CPURuntime, "driver_version", lambda _self: "4.0")
    debug = ["experiment=debug", "run.max_steps=1", "run.evaluate=false", "run.checkpoint_interval_steps=null"]
    advice = "this driver has not passed a verification in fp32 here; run: .*python.* -m lit_glm.verify hardware=cpu"
    for driver, said in (("3.0", True), ("4.0", False)):
        told = {"hardware": "cpu", "driver": driver, "runtime": "cpu"}
        folder = tmp_path / "outputs" / "verify" / "day" / driver
        environment.write_verification(folder, told, [CheckResult("clock", "ok", "")], {"fp32": True})
        assert lit_glm_here("train", *debug, f"hydra.run.dir=run{driver}") == 0
        assert bool(re.search(advice, capfd.readouterr().out)) == said


def test_a_precision_that_cannot_be_tried_is_not_recorded_as_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_arguments: Any, **_more: Any) -> Any:
        raise InputError("precision=amp: this runtime has none")

    monkeypatch.setattr(acceptance, "make_precision", refuses)
    monkeypatch.setattr(timing_check, "_BYTES", (2**20, 2**20))
    config = validate_config(compose_config("train", ["precision=amp"]), TrainConfig)
    tried = acceptance.AcceptanceTest([config], CPURuntime(), full_model=False)
    assert [check.status for check in tried.checks() if check.name.startswith("precision")] == ["skip"]
    assert tried.passed == {}


@pytest.mark.parametrize("mark", ["simulated", "computed_on_cpu"])
def test_verification_of_simulated_devices_is_ignored(mark: str, tmp_path: Path) -> None:
    told = {"hardware": "a", "driver": None, mark: True}
    environment.write_verification(
        tmp_path / "verify" / "x", told, [CheckResult("clock", "ok", "waits")], {"fp32": True}
    )
    assert environment.latest_verification([tmp_path], "a", None, "fp32") is None


def test_verify_uses_the_requested_model_shape_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(acceptance.AcceptanceTest, "checks", lambda self: iter(()))
    shape = ["model.num_layers=3", "model.hidden_size=128", "model.num_attention_heads=2", "precision=fp32"]
    assert lit_glm_here("verify", *shape) == 0
    assert "glm_large 3 x 128" in capfd.readouterr().out


def test_relative_error() -> None:
    exact = torch.tensor([1.0, -2.0, math.inf, math.nan], dtype=torch.float64)
    assert relative_error(exact.float(), exact).typical == 0.0
    assert relative_error(torch.tensor([1.0, -2.0, 3.0, math.nan]), exact).typical == math.inf
    assert relative_error(torch.ones(3), torch.ones(4, dtype=torch.float64)).typical == math.inf
    off = relative_error(torch.full((10,), 1.01), torch.ones(10, dtype=torch.float64))
    assert off.typical == pytest.approx(0.01, rel=1e-4)
    assert not off.within(operator_bound(torch.float32, 4096, tf32=False))
    overflown = torch.tensor([math.inf], dtype=torch.float16)
    assert (
        relative_error(overflown, torch.tensor([1e6], dtype=torch.float64)).typical == 0.0
    )  # more than the type holds


def test_relative_error_ignores_one_subnormal_fp16_step() -> None:
    step = 2.0**-24
    found = relative_error(torch.tensor([5 * step], dtype=torch.float16), torch.tensor([3 * step], dtype=torch.float64))
    assert found.typical == pytest.approx(1 / 3)
