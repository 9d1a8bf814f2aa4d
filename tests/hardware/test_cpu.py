"""The processor's runtime: what it sets for the whole process."""

import subprocess
import sys
from typing import List

import psutil
import pytest

from lit_glm.hardware.runtimes.cpu import CPURuntime

CODE = """
import torch
from lit_glm.hardware.runtimes.cpu import CPURuntime
torch.set_num_threads(2)
CPURuntime()
few, many = torch.full((4,), 1e-30), torch.full((2**20,), 1e-30)
print(float((few * 1e-10).abs().max()), float((many * 1e-10).abs().max()), float(few.max()))
"""


def test_denormals_are_flushed_to_zero_in_all_threads() -> None:
    """Else products of the gradients of a choice that is all but certain take thirty times as long."""
    done = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True, check=True)
    few, many, plain = map(float, done.stdout.split())
    assert (few, many) == (0.0, 0.0)
    assert plain > 0


CHILD = "x = bytearray(2**27); import sys; print(flush=True); sys.stdin.read()"


def test_cpu_memory_includes_children_found_by_periodic_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding them reads all processes of the machine, and a server has thousands."""
    looks: List[int] = []
    look = psutil.Process.children
    monkeypatch.setattr(psutil.Process, "children", lambda *args, **more: looks.append(1) or look(*args, **more))
    alone = CPURuntime().memory_in_use(0)
    loader = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert loader.stdout is not None
    loader.stdout.readline()
    runtime = CPURuntime()
    looks.clear()
    for _ in range(3):
        now, peak = runtime.memory_in_use(0), runtime.peak_memory(0)
    assert alone is not None
    assert now is not None
    assert peak is not None
    assert min(now, peak) > alone + 2**27 - 2**24
    assert len(looks) == 1
    loader.communicate()
    after = runtime.memory_in_use(0)
    assert after is not None
    assert after < now - 2**26  # it has gone,
    assert (runtime.peak_memory(0) or 0.0) >= peak - 2**24  # but the peak stays
