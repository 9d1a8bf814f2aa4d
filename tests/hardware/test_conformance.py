"""The conformance kit against runtimes of this project, and a chip whose runtime is in a package outside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import GOLDEN_RUN, lit_glm
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
def test_a_chip_of_a_package_outside(tmp_path: Path) -> None:
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
    assert "hardware._target_=beads.runtime.Abacus: cannot be found" in absent.stderr
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


def test_what_is_no_runtime_is_refused() -> None:
    with pytest.raises(InputError, match="is no subclass of"):
        import_runtime_class("collections.OrderedDict")
    for absent in ("nowhere.At.All", "Class", "lit_glm.hardware.runtimes.cpu.NoSuch"):
        with pytest.raises(InputError, match="hardware._target_"):
            import_runtime_class(absent)
    config: Any = HardwareConfig(name="x")
    assert config._target_ is None
