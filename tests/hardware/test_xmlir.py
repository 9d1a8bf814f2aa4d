"""The native runtime through a double of its package, on the stack that it exists for. No card takes part."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest
import torch

from conftest import GOLDEN_RUN, lit_glm
from parity.test_training import check_trajectory

DOUBLES = Path(__file__).parent.parent / "doubles"
CHIP = ["hardware=r300", "hardware.runtime=xmlir", *GOLDEN_RUN]
native = pytest.mark.skipif(
    not torch.__version__.startswith("1."),
    reason="torch_xmlir exists for torch 1.12 only; see scripts/test_seed_stack.sh",
)


def doubles(**more: str) -> Dict[str, str]:
    path = os.pathsep.join(filter(None, [str(DOUBLES), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "PATH": f"{DOUBLES / 'bin'}{os.pathsep}{os.environ['PATH']}", **more}


@native
@pytest.mark.parametrize("topology", ["1x1", "1x2"])
def test_golden_steps(topology: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = lit_glm("train", *CHIP, f"topology={topology}", f"hydra.run.dir={run}", cwd=tmp_path, env=doubles())
    assert done.returncode == 0, done.stderr
    check_trajectory(run, "erf", int(topology[-1]))
    result = json.loads((run / "result.json").read_text())
    assert (result["runtime"], result["simulated"]) == ("xmlir", False)
    # By the vendor's monitor, the highest card: N uses 20000 + N MiB.
    ranks = int(topology[-1])
    assert result["mem_actual_gib"] == pytest.approx((20000 + ranks - 1) / 1024)
    assert result["mem_total_gib"] == pytest.approx(32.0)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["devices"] == [f"double of an R300, card {card}" for card in range(ranks)]


@native
@pytest.mark.parametrize("spelling", ["synchronize", "xpu_synchronize"])
def test_xmlir_run_uses_vendor_checkpointing_and_empties_the_cache(spelling: str, tmp_path: Path) -> None:
    """Switches before the import, the vendor's checkpointing and scaler, the cache emptied after each step."""
    code = (
        "import sys, json, torch_xmlir as v\n"
        "from lit_glm.train import main\n"
        "status = main()\n"
        "json.dump({'calls': v.xpu.CALLS, 'checkpoint': v.nn.checkpoint.CALLS[0]}, open('calls.json', 'w'))\n"
        "sys.exit(status)"
    )
    overrides = [*CHIP, "run.max_steps=3", "model.activation_checkpointing=true", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides],
        cwd=tmp_path,
        env={**os.environ, **doubles(DOUBLE_SPELLING=spelling)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls["calls"]["empty_cache"] == 3
    assert calls["checkpoint"] == 3 * 3  # three layers, three steps
    assert calls["calls"]["synchronize"] >= 6


@native
def test_switches_are_set_before_the_package_is_imported_in_every_rank(tmp_path: Path) -> None:
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "torch_xmlir.py").write_text(
        "import os, sys\n"
        "open(os.environ['SPY'] + os.environ.get('RANK', ''), 'w').write(repr([os.environ.get(n) for n in"
        " ('XACC', 'XACC_ARGS', 'BKCL_TIMEOUT')]))\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(spy)!r}]; del sys.modules['torch_xmlir']\n"
        "import torch_xmlir\n"
    )
    env = doubles(SPY=str(tmp_path / "seen"), BKCL_TIMEOUT="60")
    env["PYTHONPATH"] = f"{spy}{os.pathsep}{env['PYTHONPATH']}"
    overrides = ["topology=1x2", "run.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    done = lit_glm("train", *CHIP, *overrides, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (tmp_path / f"seen{rank}").read_text() == "['1', '-L O0', '60']"
    assert done.stderr.count("keeping BKCL_TIMEOUT=60 (environment); conf/hardware/r300.yaml: 1800") == 1


@native
def test_more_devices_than_visible_are_rejected(tmp_path: Path) -> None:
    done = lit_glm("train", *CHIP, "topology=1x2", cwd=tmp_path, env=doubles(XPU_VISIBLE_DEVICES="3"))
    assert done.returncode == 2
    assert "topology=1x2 needs 2 devices per node; runtime xmlir finds 1" in done.stderr


@native
def test_bkcl_tree_with_odd_number_of_nodes_is_rejected(tmp_path: Path) -> None:
    env = doubles(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999", NODE_RANK="1")
    nodes = ["topology.num_nodes=3", "topology.devices_per_node=1"]
    done = lit_glm("train", *CHIP, *nodes, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "topology=3x1: BKCL_SOCKET_FORCE_TREE=1" in done.stderr
    assert "an even number of nodes, not 3" in done.stderr


@native
def test_xmlir_peak_memory_uses_runtime_statistics_if_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    from lit_glm.hardware.runtimes.kunlunxin import XMLIRRuntime

    runtime = XMLIRRuntime()
    assert runtime.peak_memory(0) is None  # no monitor, no statistics
    monkeypatch.setattr(runtime._vendor.xpu, "max_memory_reserved", lambda index: 2**30 + index, raising=False)
    assert runtime.peak_memory(1) == 2**30 + 1


@native
def test_a_precision_that_the_stack_cannot_compute(tmp_path: Path) -> None:
    done = lit_glm("train", *CHIP, "precision=fp16", cwd=tmp_path, env=doubles())
    assert done.returncode == 2
    assert "precision=fp16: not supported by runtime xmlir with torch 1.12.1" in done.stderr


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="about torch 2")
def test_xmlir_native_runtime_rejects_current_torch(tmp_path: Path) -> None:
    done = lit_glm("train", *CHIP, cwd=tmp_path, env=doubles())
    assert done.returncode == 2
    assert "is not the 1.12.1+cpu of the native runtime" in done.stderr
    assert "hardware.runtime=simulated" in done.stderr
