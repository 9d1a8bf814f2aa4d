"""Devices that behave like those of others: memory of their own, operators by fall-back, lazy execution.

`tests/doubles/chip` is a device type that torch does not know. It is compiled here, in about ten seconds.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import pytest
import torch

from conftest import lit_glm, rows, start_command

FOLDER = Path(__file__).parent.parent / "doubles" / "chip"
OWN = ["--config-dir", str(FOLDER / "conf")]
DEBUG = ["experiment=debug", "run.max_steps=12", "run.checkpoint_interval_steps=1", "logger={}"]
RUNTIMES = {"chip": "Chip", "lazychip": "LazyChip"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__.startswith("1."), reason="needs the interface for devices of torch 2"),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"),
]


@pytest.fixture(scope="session")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    """Variables with which a process finds the device."""
    folder = tmp_path_factory.mktemp("chip")
    build = (
        "from torch.utils.cpp_extension import load; load('chip_device', [r'{}'], build_directory=r'{}', "
        "is_python_module=False, extra_cflags=['-O0'])"
    ).format(FOLDER / "chip_device.cpp", folder)
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"CHIP_LIBRARY": str(folder / "chip_device.so"), "PYTHONPATH": path}


def losses(folder: Path) -> List[float]:
    return [float(row["loss"]) for row in rows(folder / "steps.csv")]


@pytest.fixture(scope="session")
def trained(chip: Dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Hardware, topology -> folder of a finished run, made once."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.lru_cache(maxsize=None)
    def train(name: str, topology: str) -> Path:
        run = folder / f"{name}_{topology}"
        shape = [f"topology={topology}"]
        if (name, topology) == ("cpu", "1x2"):
            shape = ["topology=1x1", "bs=8"]  # the same global batch
        line = [*OWN, f"hardware={name}", *DEBUG, *shape, f"hydra.run.dir={run}"]
        done = lit_glm("train", *line, cwd=folder, env=None if name == "cpu" else chip, cold=name == "chip")
        assert done.returncode == 0, done.stderr
        return run

    return train


@pytest.mark.parametrize(("topology", "names"), [("1x1", ["chip", "lazychip"]), ("1x2", ["lazychip"])])
def test_chip_training_losses_match_cpu(topology: str, names: List[str], trained: Callable[[str, str], Path]) -> None:
    """Two ranks of the lazy device only, whose collectives need computed values; `verify` runs two of the other."""
    expected = losses(trained("cpu", topology))
    for name in names:
        run = trained(name, topology)
        assert losses(run) == pytest.approx(expected, rel=1e-5)
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["hardware"], result["simulated"]) == ("finished", name, False)
        assert 0 < result["mem_actual_gib"] < result["mem_total_gib"] == 1.0


@pytest.mark.parametrize("name", RUNTIMES)
def test_interrupted_chip_run_is_resumed_and_evaluated(
    name: str, chip: Dict[str, str], trained: Callable[[str, str], Path], tmp_path: Path
) -> None:
    line = [*OWN, f"hardware={name}", *DEBUG]
    process = start_command("train", *line, "hydra.run.dir=parts", cwd=tmp_path, env=chip)
    steps, limit = tmp_path / "parts" / "steps.csv", time.monotonic() + 120
    while not (steps.is_file() and steps.read_bytes().count(b"\n") > 2) and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert len(losses(tmp_path / "parts")) < 12
    again = lit_glm("train", *line, "run.resume=parts", cwd=tmp_path, env=chip)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "parts") == losses(trained(name, "1x1"))

    scores = []
    for hardware in (name, "cpu"):
        run = ["parts", *OWN, f"hardware={hardware}", f"hydra.run.dir=on-{hardware}"]
        done = lit_glm("evaluate", *run, cwd=tmp_path, env=None if hardware == "cpu" else chip)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"on-{hardware}" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        scores.append([entry["score"] for line in lines for entry in json.loads(line)["scores"]])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("name", "topology"), [("chip", "1x2"), ("lazychip", "1x1")])
def test_verify_passes_on_chip(name: str, topology: str, chip: Dict[str, str], tmp_path: Path) -> None:
    line = [
        *OWN,
        f"hardware={name}",
        f"topology={topology}",
        "precision=fp32",
        "model=glm_tiny",
        "model.num_layers=1",
        "hydra.run.dir=verify",
    ]
    done = lit_glm("verify", *line, cwd=tmp_path, env=chip)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "verify" / "verify.json").read_text())["checks"]
    found = {check["name"]: check["status"] for check in checks}
    assert {"clock", "dropout", "collectives", "operators fp32", "model fp32", "training fp32"} <= set(found)
    assert found.pop("clock") in ("ok", "warn")  # on a busy machine time does not scale with work
    assert found.pop("collectives") == ("ok" if topology == "1x2" else "skip")
    assert set(found.values()) == {"ok"}


def test_verify_fails_on_chip_with_non_blocking_synchronize(chip: Dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hasty.py").write_text(
        "from torch_chip import LazyChip\nclass NonBlocking(LazyChip):\n"
        "    def synchronize(self): pass\n    def after_step(self): pass\n"
    )
    (tmp_path / "own" / "hardware").mkdir(parents=True)
    (tmp_path / "own" / "hardware" / "hasty.yaml").write_text("name: hasty\n_target_: hasty.NonBlocking\n")
    path = os.pathsep.join([str(tmp_path), chip["PYTHONPATH"]])
    line = ["--config-dir", "own", "hardware=hasty", "precision=fp32", "model=glm_tiny", "hydra.run.dir=verify"]
    line += ["verify.max_minutes=0.02"]  # the clock is checked first
    done = lit_glm("verify", *line, cwd=tmp_path, env={**chip, "PYTHONPATH": path})
    assert done.returncode == 1
    assert "FAIL  clock: " in done.stdout


@pytest.mark.parametrize("kind", RUNTIMES.values())
def test_chip_passes_the_conformance_tests(kind: str, chip: Dict[str, str]) -> None:
    kit = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "conformance.py")]
    done = subprocess.run(
        [*kit, f"--runtime=torch_chip.{kind}", "-p", "no:cacheprovider"],
        env={**os.environ, **chip},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_chip_memory_is_protected_and_unread_work_is_dropped(chip: Dict[str, str]) -> None:
    """The double behaves as documented; otherwise the tests above would prove nothing."""
    program = """
import ctypes, sys, torch, torch_chip
runtime = torch_chip.LazyChip()
x = torch.ones(4, 4).to(runtime.device(0))
runtime.synchronize()
before = torch_chip.ENGINE.num_run
unread, read = x @ x, x + x
del unread
runtime.synchronize()
print(torch_chip.ENGINE.num_run - before, torch_chip.ENGINE.num_dropped, read.cpu().sum().item(), flush=True)
ctypes.string_at(x.data_ptr(), 4)
print("read")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **chip}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 1 32.0\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
