"""Lightning's view of a chip, and what is said of fp32's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
import torch

from conftest import GOLDEN_RUN, lit_glm_here
from lit_glm.config.schema import HardwareConfig, TopologyConfig
from lit_glm.hardware.accelerator import make_accelerator
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.hardware.runtimes.selection import make_runtime

INTELS = """
import sys, torch
def refuse(*a, **k): raise SystemExit("Intel's xpu was asked")
for name in ("is_available", "device_count", "current_device", "synchronize", "get_device_name", "empty_cache"):
    if hasattr(torch, "xpu") and hasattr(torch.xpu, name):
        setattr(torch.xpu, name, refuse)
if hasattr(torch.distributed, "is_xccl_available"):
    torch.distributed.is_xccl_available = refuse
    torch.distributed.distributed_c10d.is_xccl_available = refuse
from lit_glm.train import main
sys.exit(main())
"""


def test_accelerator_has_name_and_devices_of_its_runtime() -> None:
    runtime = make_runtime(HardwareConfig(name="r300", runtime="simulated", memory_gib=32.0), TopologyConfig(1, 2))
    accelerator: Any = make_accelerator(runtime, "kunlunxin")
    assert type(accelerator).name() == "kunlunxin"
    assert type(accelerator).auto_device_count() == 2
    assert type(accelerator).get_parallel_devices([0, 1]) == [torch.device("cpu")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["simulated", "auto"])
def test_torch_xpu_functions_are_not_called_for_r300(runtime: str, tmp_path: Path) -> None:
    chip = ["hardware=r300", f"hardware.runtime={runtime}", "run.max_steps=1", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", INTELS, *GOLDEN_RUN, *chip], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if runtime == "simulated" else 2), done.stderr
    assert "Intel's xpu" not in done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("allowed", "said"), [("true", "fp32 (TF32 on)"), ("false", "fp32 (TF32 off)")])
def test_fp32_run_logs_and_records_the_tf32_setting(
    allowed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """On a processor that is told to have TF32: a double, since no such card is here."""
    asked: List[bool] = []
    monkeypatch.setattr(CPURuntime, "has_tf32", True)
    monkeypatch.setattr(CPURuntime, "allow_tf32", lambda self, allowed: asked.append(allowed))
    run = tmp_path / "run"
    how = [f"precision.tf32={allowed}", "run.max_steps=1", f"hydra.run.dir={run}"]
    assert lit_glm_here("train", *GOLDEN_RUN, *how) == 0
    assert said in capfd.readouterr().out
    assert json.loads((run / "result.json").read_text())["tf32"] is (allowed == "true")
    assert set(asked) == {allowed == "true"}


def test_cpu_run_logs_no_tf32_setting(tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert lit_glm_here("train", *GOLDEN_RUN, "run.max_steps=1", f"hydra.run.dir={run}") == 0
    assert "TF32" not in capfd.readouterr().out
    assert json.loads((run / "result.json").read_text())["tf32"] is False
