"""A run notices that it is not alone."""

import os
import subprocess
import sys
import time
from typing import Any, Optional

import pytest

from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.metrics.system_info import ContentionMonitor
from lit_glm.runs.result import annotations, was_contended


class FakeDeviceRuntime(Runtime):
    """A double: cards of which a driver counts the processes."""

    def __init__(self, processes: Optional[int]) -> None:
        self._processes = processes

    def num_processes(self, index: int) -> Optional[int]:
        return self._processes


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize(
    ("load", "on_devices", "contended"),
    [(None, None, False), (0.1, 0, False), (0.11, 0, True), (0.0, 1, True), ("0.5", "1", False)],
)
def test_contention_is_a_tenth_of_the_cpus_or_any_process_on_the_devices(
    load: Any, on_devices: Any, contended: bool
) -> None:
    assert was_contended({"external_cpu_load": load, "external_device_processes": on_devices}) == contended


@pytest.mark.slow
def test_external_cpu_load_excludes_own_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ContentionMonitor(FakeDeviceRuntime(None), 1)
    others.sample()
    assert others.external_cpu_load is None  # too early to tell
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        _spin(2.5)
        others.sample()
        with_child = others.external_cpu_load  # a child of ours is ours
    finally:
        child.kill()
        child.wait()
    assert with_child is not None
    # As if this process were somebody else's.
    monkeypatch.setattr(ContentionMonitor, "_tree_cpu_seconds", lambda _: 0.0)
    stranger = ContentionMonitor(FakeDeviceRuntime(None), 1)
    _spin(2.5)
    assert stranger.sample_if_due() is None  # not every moment
    stranger.sample()
    alone = stranger.external_cpu_load
    assert alone is not None
    assert alone >= 0.8 / (os.cpu_count() or 1)


def test_other_device_processes_are_logged_once() -> None:
    others = ContentionMonitor(FakeDeviceRuntime(3), 1)
    said = others.sample()
    assert said is not None
    assert "2 other processes" in said
    assert others.sample() is None
    assert others.external_device_processes == 2


def test_nothing_is_logged_without_other_device_processes() -> None:
    others = ContentionMonitor(FakeDeviceRuntime(1), 1)
    assert others.sample() is None
    assert others.external_device_processes == 0


def test_row_of_a_contended_run_is_annotated() -> None:
    row = {"status": "finished", "external_cpu_load": 0.42}
    assert annotations(row) == ["contention: other processes used 42% of the CPUs"]
    assert annotations({**row, "external_cpu_load": 0.05}) == []
    assert annotations({**row, "external_cpu_load": None, "external_device_processes": 1}) != []
    on_devices = annotations({**row, "external_cpu_load": 0.004, "external_device_processes": 1})
    assert on_devices == ["contention: other processes used the devices"]
