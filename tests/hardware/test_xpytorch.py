"""The CUDA-compatible runtime through a double of its package: what is asked of whom. No card takes part."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from conftest import GOLDEN_RUN, lit_glm
from hardware.test_monitors import new_line

DOUBLE = Path(__file__).parent.parent / "doubles" / "xpytorch"
pytestmark = pytest.mark.skipif(torch.__version__.startswith("1."), reason="XPyTorch exists for torch 2 only")
ASK = """
import json, os
from pathlib import Path
from lit_glm.hardware.device_monitor import monitor_devices
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.selection import make_runtime
config = validate_config(compose_config("train", ["hardware=r300", "topology=1x2"]), TrainConfig)
runtime = make_runtime(config.hardware, config.topology)
file = Path(os.environ["HOME"]) / "devices.csv"
with monitor_devices(config.hardware, file, 0, 2, 0.0):
    pass
runtime.attach_memory_monitor(1, file)
import torch, torch_xmlir
print(json.dumps([runtime.name, runtime.backend, runtime.has_tf32, runtime.device_count(), str(runtime.device(1)),
    [runtime.device_name(card) for card in (0, 1)], runtime.peak_memory(1), runtime.total_memory(1),
    torch_xmlir.AT_IMPORT]))
"""


@pytest.fixture
def env(tmp_path: Path) -> Dict[str, str]:
    """The double on PYTHONPATH, and a monitor of the newer drivers that knows cards 0 and 5."""
    tool = tmp_path / "bin" / "xpu-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{new_line(0, 1000)}'\necho '{new_line(5, 9000)}'\n")
    tool.chmod(0o755)
    path = os.pathsep.join(filter(None, [str(DOUBLE), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": path,
        "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}",
    }


def ask(env: Dict[str, str]) -> Any:
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_auto_selects_xpytorch_with_memory_from_the_monitor(env: Dict[str, str]) -> None:
    name, backend, tf32, cards, device, names, peak, total, at_import = ask({**env, "CUDA_VISIBLE_DEVICES": "0,5"})
    assert (name, backend, tf32, cards, device) == ("xpytorch", "nccl", False, 2, "cuda:1")
    assert names == ["KUNLUN R300", "KUNLUN R300"]
    assert (peak, total) == (9000 * 2**20, 32 * 2**30)
    assert at_import == {"BKCL_TIMEOUT": "1800", "XACC": "1"}  # set before the import


def test_memory_comes_from_the_allocator_without_a_monitor(env: Dict[str, str]) -> None:
    assert ask({**env, "PATH": "/nowhere"})[5:7] == [["", ""], 7 * 2**30]


def test_vendor_package_without_devices_is_reported(env: Dict[str, str], tmp_path: Path) -> None:
    done = lit_glm("train", "hardware=r300", *GOLDEN_RUN, cwd=tmp_path, env={**env, "DOUBLE_CARDS": "0"})
    assert done.returncode == 2
    assert "xmlir: torch_xmlir is installed, but torch" in done.stderr
    assert "xpytorch: torch_xmlir is installed but sees no XPU" in done.stderr
    assert "Traceback" not in done.stderr
