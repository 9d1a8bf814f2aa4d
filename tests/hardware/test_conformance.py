"""The conformance tests against runtimes of this project, and a chip whose runtime is in a package outside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import GOLDEN_RUN, lit_glm, lit_glm_here
from hardware.conformance import *  # noqa: F403  # its checks, here on the processor
from lit_glm.config.schema import HardwareConfig
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.selection import import_runtime_class

RUNTIME = """
from lit_glm.hardware.runtimes.cpu import CPURuntime

class Abacus(CPURuntime):
    name = "abacus"
    def device_name(self, index):
        return "Abacus 9"
"""
CHIP = """
name: abacus
vendor: Beads
product_name: ABACUS
_target_: beads.runtime.Abacus
accelerator: abacus
env: {BEADS: "7"}
memory_gib: null
precisions: [fp32]
gelu: tanh
"""


@pytest.mark.slow
def test_runtime_of_an_external_package_runs_and_passes_conformance(tmp_path: Path) -> None:
    (tmp_path / "lib" / "beads").mkdir(parents=True)
    (tmp_path / "lib" / "beads" / "__init__.py").touch()
    (tmp_path / "lib" / "beads" / "runtime.py").write_text(RUNTIME)
    (tmp_path / "own" / "hardware").mkdir(parents=True)
    (tmp_path / "own" / "hardware" / "abacus.yaml").write_text(CHIP)
    how = ["--config-dir", "own", *GOLDEN_RUN, "hardware=abacus", "run.max_steps=2", "hydra.run.dir=run"]
    done = lit_glm("train", *how, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "lib")})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["runtime"], result["hardware"], result["simulated"]) == ("abacus", "abacus", False)
    absent = lit_glm("train", *how[:-1], cwd=tmp_path)
    assert absent.returncode == 2
    assert "hardware._target_=beads.runtime.Abacus: cannot be imported" in absent.stderr
    # The kit runs against it as it would in its own project.
    kit = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "hardware/conformance.py"]
    checked = subprocess.run(
        [*kit, "--runtime=beads.runtime.Abacus"],
        cwd=str(Path(__file__).parent.parent),
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_target_that_is_not_a_runtime_is_rejected() -> None:
    with pytest.raises(InputError, match="not a subclass of"):
        import_runtime_class("collections.OrderedDict")
    for absent in ("nowhere.At.All", "Class", "lit_glm.hardware.runtimes.cpu.NoSuch"):
        with pytest.raises(InputError, match="hardware._target_"):
            import_runtime_class(absent)
    config: Any = HardwareConfig(name="x")
    assert config._target_ is None


MINI = """
from lit_glm.hardware.runtimes.cpu import CPURuntime

class Mini(CPURuntime):
    name = "mini"

    monitor = "minimonitor.MONITOR"

class NoTotal(Mini):
    def total_memory(self, index):
        return None
"""
MONITOR = """
from lit_glm.hardware.monitors import DeviceReading, Monitor

MONITOR = Monitor(lambda wanted: [DeviceReading(0, 40.0, 25.0, 1024.0, 4096.0, 50.0)])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "minibeads.py").write_text(MINI)
    (tmp_path / "lib" / "minimonitor.py").write_text(MONITOR)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    (tmp_path / "own" / "hardware").mkdir(parents=True)
    (tmp_path / "own" / "hardware" / "mini.yaml").write_text(
        "name: mini\nproduct_name: MINI\n_target_: minibeads.Mini\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_hardware_file_needs_only_name_and_target(own: Path, capfd: Any) -> None:
    how = ["--config-dir", "own", "experiment=debug", "hardware=mini", "run.max_steps=2"]
    assert lit_glm_here("train", *how, "hydra.run.dir=run") == 0
    result = json.loads((own / "run" / "result.json").read_text())
    assert (result["hardware"], result["computed_on_cpu"], result["simulated"]) == ("mini", True, False)
    assert (result["energy_j"] or 0.0) > 0
    assert (own / "run" / "devices.csv").read_text().splitlines()[1].endswith(",0,0,1,25,40,50")
    assert "mini 1x1 (computed on the CPU)" in capfd.readouterr().out
    assert lit_glm_here("train", *how, "hardware.runtime=cuda") == 2
    assert "hardware=mini has its own class" in capfd.readouterr().err


def test_keys_that_a_file_lacks_can_be_set(own: Path) -> None:
    keys = ["hardware._target_=minibeads.NoTotal", "hardware.memory_gib=64", "precision.loss_scale.window=5"]
    how = ["experiment=debug", "hardware.runtime=auto", "run.max_steps=2", *keys]
    assert lit_glm_here("train", *how, "hydra.run.dir=run") == 0
    result = json.loads((own / "run" / "result.json").read_text())
    assert result["mem_actual_gib"] > 0
    assert (result["mem_total_gib"], result["mem_total_source"]) == (64.0, "hardware file")


@pytest.mark.process
def test_profile_is_written_for_tensors_without_storage(own: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from lit_glm.metrics import profiler

    monkeypatch.setattr(profiler, "_storage_bytes", lambda tensor: None)
    how = ["experiment=debug", "callbacks=profile", "run.max_steps=20"]
    assert lit_glm_here("train", *how, "hydra.run.dir=run") == 0
    assert "memory by kind is not available" in capfd.readouterr().out
    assert (own / "run" / "profile" / "kernels.md").is_file()


MISTAKES = """
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.cpu import CPURuntime
import torch

class NoCount(Runtime):
    name = "nocount"
    def device(self, index):
        return torch.device("cpu")

class Raises(CPURuntime):
    def __init__(self):
        raise ValueError("firmware 3 is too old")

class WrongMonitor(CPURuntime):
    monitor = "no_such_module.MONITOR"

class NoMonitor(CPURuntime):
    monitor = "json.dumps"

class Memory(CPURuntime):
    shares_memory = False
    def total_memory(self, index):
        return 2.0**20
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("NoCount", "NoCount has no method device_count (docs/new_chip.md)"),
        ("Raises", "ValueError: firmware 3 is too old"),
        ("WrongMonitor", "monitor no_such_module.MONITOR of the runtime: cannot be imported"),
        ("NoMonitor", "monitor json.dumps of the runtime: is no lit_glm.hardware.monitors.Monitor"),
    ],
)
def test_runtime_class_errors_are_found_before_a_run(kind: str, said: str, own: Path, capfd: Any) -> None:
    (own / "lib" / "mistakes.py").write_text(MISTAKES)
    how = ["--config-dir", "own", "experiment=debug", "hardware=mini", f"hardware._target_=mistakes.{kind}"]
    assert lit_glm_here("doctor", *how) == 1
    assert said in capfd.readouterr().out
    if kind != "NoCount":
        assert lit_glm_here("train", *how, "run.max_steps=1", "hydra.run.dir=run") == 2
        assert said in capfd.readouterr().err
        assert (own / "run" / "result.json").exists() == (kind == "Raises")  # only a rank creates the runtime


def test_memory_reading_above_the_device_total_is_null(own: Path) -> None:
    (own / "lib" / "mistakes.py").write_text(MISTAKES)
    how = ["--config-dir", "own", "experiment=debug", "hardware=mini", "hardware._target_=mistakes.Memory"]
    assert lit_glm_here("train", *how, "run.max_steps=1", "hydra.run.dir=run") == 0
    result = json.loads((own / "run" / "result.json").read_text())
    assert result["mem_actual_gib"] is None
    assert "is above the device's 0.0" in result["missing_data"][0]
    how += ["hardware._target_=minibeads.NoTotal", "hardware.memory_gib=0.01"]  # the total of the file counts too
    assert lit_glm_here("train", *how, "run.max_steps=1", "hydra.run.dir=other") == 0
    result = json.loads((own / "other" / "result.json").read_text())
    assert (result["mem_actual_gib"], result["mem_total_gib"]) == (None, 0.01)


RAISING = """
from lit_glm.hardware.monitors import DeviceReading, Monitor

readings = iter([[DeviceReading(0, 40.0, 25.0, 1024.0, 4096.0, 50.0)]])

MONITOR = Monitor(lambda wanted: next(readings))
"""


def test_monitor_exception_is_logged_and_the_run_continues(own: Path, capfd: Any) -> None:
    (own / "lib" / "minimonitor.py").write_text(RAISING)
    how = ["--config-dir", "own", "experiment=debug", "hardware=mini", "run.max_steps=2", "hydra.run.dir=run"]
    assert lit_glm_here("train", *how) == 0
    assert "device monitor minimonitor.MONITOR: a reading failed (StopIteration" in capfd.readouterr().err
    assert len((own / "run" / "devices.csv").read_text().splitlines()) == 2


BARE = """
import time
from pathlib import Path
import pytorch_lightning as pl
import torch
from lit_glm.hardware.runtimes.base import Runtime

class Bare(Runtime):
    name = "bare"
    monitor = "minimonitor.MONITOR"
    def device_count(self):
        return 1
    def device(self, index):
        return torch.device("cpu")

class WaitForReading(pl.Callback):
    "Two steps may end before the monitor, a process of its own, has read anything."
    def on_train_start(self, trainer, pl_module):
        file, limit = Path(trainer.default_root_dir, "devices.csv"), time.monotonic() + 120
        while not (file.is_file() and file.read_text().count("\\n") > 1) and time.monotonic() < limit:
            time.sleep(0.02)
"""


def test_memory_of_the_monitor_is_used_if_the_runtime_has_none(own: Path) -> None:
    """A class that says nothing of memory, with a monitor that does."""
    (own / "lib" / "bare.py").write_text(BARE)
    how = ["--config-dir", "own", "experiment=debug", "hardware=mini", "hardware._target_=bare.Bare"]
    how += ["+callbacks.wait._target_=bare.WaitForReading"]
    assert lit_glm_here("train", *how, "run.max_steps=2", "hardware.memory_gib=4", "hydra.run.dir=run") == 0
    result = json.loads((own / "run" / "result.json").read_text())
    assert (result["mem_actual_gib"], result["mem_total_gib"]) == (1.0, 4.0)
