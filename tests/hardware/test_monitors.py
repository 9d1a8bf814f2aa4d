"""What the vendor's monitors print, good and broken."""

import doctest
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.hardware import monitors
from lit_glm.hardware.monitors import (
    MONITORS,
    CPUMonitor,
    DeviceReading,
    nvidia_driver_version,
    nvml_readings,
    parse_names,
    parse_xpu_smi,
    parse_xpu_smi_m,
    physical_device_index,
    xpu_readings,
    xpu_total_memory,
)


def new_line(card: int, used: object, total: object = 32768) -> str:
    fields = ["x"] * 23
    fields[0], fields[1] = "0", str(card)
    fields[4], fields[8], fields[17], fields[18], fields[19] = "46", "114", str(used), str(total), "100"
    fields[21], fields[22] = '"KUNLUN', 'R300"'
    return " ".join(fields)


def old_line(used: str, total: str = "32768MiB") -> str:
    fields = ["x"] * 30
    fields[0] = "xpu"
    fields[28], fields[26], fields[21], fields[23], fields[13] = "46C", "114W", used, total, "100%"
    return " ".join(fields)


def test_monitor_doctests_pass() -> None:
    assert doctest.testmod(monitors).failed == 0


def test_newer_drivers() -> None:
    readings = parse_xpu_smi_m("\n".join(new_line(card, 1000 + card) for card in (0, 3)))
    assert [(entry.index, entry.used_mib, entry.total_mib) for entry in readings] == [
        (0, 1000, 32768),
        (3, 1003, 32768),
    ]
    assert (readings[0].temperature_c, readings[0].power_w, readings[0].utilisation) == (46, 114, 100)


def test_older_drivers() -> None:
    text = "a head line\n" + "\n".join([old_line("23730MiB"), old_line("1MiB"), "xpu: no more"])
    assert [(entry.index, entry.used_mib) for entry in parse_xpu_smi(text)] == [(0, 23730), (1, 1)]


@pytest.mark.parametrize("used", ["N/A", "nan", "-1", "inf", "40000"])
def test_a_broken_reading_is_left_out(used: str) -> None:
    assert parse_xpu_smi_m(new_line(0, used) + "\n" + new_line(1, 5)) == parse_xpu_smi_m(new_line(1, 5))
    assert parse_xpu_smi(old_line(used)) == []


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert parse_xpu_smi_m(text) == [] or text
    assert parse_xpu_smi(text) == [] or text


def test_device_names_are_parsed() -> None:
    text = "\n".join(["a head line", new_line(0, 1), new_line(5, "N/A"), '"nobody"'])
    assert parse_names(text) == {0: "KUNLUN R300", 5: "KUNLUN R300"}


@given(st.text())
def test_device_name_parser_accepts_any_text(text: str) -> None:
    assert all(name in text for name in parse_names(text).values())


@pytest.mark.parametrize(("visible", "card"), [("", 1), ("4,7", 7), ("4", 1), ("4, 7 ", 7), ("GPU-a,GPU-b", None)])
def test_visible_device_maps_to_physical_device_index(
    visible: str, card: Optional[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VISIBLE_DEVICES", visible)
    assert physical_device_index(1, "SOME_VISIBLE_DEVICES") == card


def test_the_tool_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "xpu-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -m ] && echo '{new_line(0, 2048)}'\n")
    tool.chmod(0o755)
    assert xpu_readings() == []
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [entry.used_mib for entry in xpu_readings()] == [2048]


def test_xpu_smi_output_with_invalid_utf8_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "xpu_smi"
    tool.write_text(f"#!/bin/sh\nprintf 'xpu_smi 4.0, 46 \\260C\\n'\necho '{old_line('2048MiB')}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [entry.used_mib for entry in xpu_readings()] == [2048]  # the heading has the word, and is no card


def test_xpu_total_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "xpu-smi"
    tool.write_text(f"#!/bin/sh\necho '{new_line(3, 2048)}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert (xpu_total_memory(3), xpu_total_memory(0), xpu_total_memory(None)) == (32768 * 2**20, None, None)


def test_nvml_readings_with_a_fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card was in reach: the double has the functions of nvidia-ml-py that are called."""

    def memory(handle: int, version: int = 1) -> SimpleNamespace:
        reserved = 0 if version == 2 else 2**29  # the first version counts what the driver keeps
        return SimpleNamespace(used=(5 + 2 * handle) * 2**30 + reserved, total=80 * 2**30)

    def silent(handle: int) -> None:
        raise RuntimeError("not supported")

    double = SimpleNamespace(
        NVML_TEMPERATURE_GPU=0,
        nvmlMemory_v2=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetTemperature=lambda handle, kind: 40 + handle,
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
        nvmlDeviceGetUtilizationRates=silent,
    )
    monkeypatch.setitem(sys.modules, "pynvml", double)
    assert nvml_readings() == [
        DeviceReading(0, 40.0, 250.0, 5 * 1024, 80 * 1024, None),
        DeviceReading(1, 41.0, 250.0, 7 * 1024, 80 * 1024, None),
    ]
    del double.nvmlMemory_v2  # an older package
    assert nvml_readings()[0].used_mib == 5 * 1024 + 512

    def fails() -> None:
        raise RuntimeError("driver not loaded")

    double.nvmlInit = fails
    assert nvml_readings() == []


def test_cpu_monitor_reads_rapl_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    memory = SimpleNamespace(total=8 * 2**30, available=6 * 2**30)
    monkeypatch.setattr(monitors, "time", clock)
    monkeypatch.setattr(monitors.psutil, "virtual_memory", lambda: memory)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("5000000\n")
    (zone / "max_energy_range_uj").write_text("9000000\n")
    processors = CPUMonitor(tmp_path)
    (first,) = processors.readings()
    assert (first.index, first.power_w) == (0, 0.0)  # the counter stands
    assert (first.used_mib, first.total_mib) == (2048.0, 8192.0)
    now[0] += 2.0
    (zone / "energy_uj").write_text("1000000\n")  # it has begun anew: 5 J further
    assert [reading.power_w for reading in processors.readings()] == [2.5]
    now[0] += 0.5
    (zone / "energy_uj").write_text("7000000\n")
    assert [reading.power_w for reading in processors.readings()] == [12.0]
    assert [reading.power_w for reading in CPUMonitor(tmp_path / "nothing").readings()] == [None]


class _Nvml:
    """A double of nvidia-ml-py: two cards, of which the second has a MIG slice."""

    NVML_TEMPERATURE_GPU = 0
    uuids = ("GPU-aaaa", "GPU-bbbb", "MIG-cccc")

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return self.uuids[handle].encode()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return self.uuids.index(uuid)

    def nvmlDeviceGetMigMode(self, handle: int) -> List[int]:  # noqa: N802
        return [int(handle == 1), 1]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=(1 + handle) * 2**30, total=80 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 2:
            raise RuntimeError("not supported")
        return 100_000 * (1 + handle)


@pytest.mark.parametrize(
    ("visible", "index", "power_w", "used_gib"),
    [
        ("0", 0, 100.0, 1),
        ("GPU-aaaa", 0, 100.0, 1),
        ("GPU-a", 0, 100.0, 1),
        ("1", 1, None, None),  # a slice of it: what the whole card takes is not its own
        ("MIG-cccc", "MIG-cccc", None, 3),
    ],
)
def test_devices_by_uuid_or_mig_name_have_their_own_readings(
    visible: str, index: Any, power_w: Any, used_gib: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml())
    name = MONITORS["cuda"].resolve(visible)
    assert name == str(index)
    (reading,) = MONITORS["cuda"].read([name])
    assert (reading.index, reading.power_w) == (index, power_w)
    assert reading.used_mib == (None if used_gib is None else used_gib * 1024)
    for unknown in ("GPU-", "GPU-zzzz", "7"):
        found = MONITORS["cuda"].resolve(unknown)
        assert found is None or MONITORS["cuda"].read([found]) == []


@pytest.mark.parametrize(
    "printed",
    [
        "Failed to initialize NVML: Driver/library version mismatch",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "No devices were found",
        "[N/A]",
        "",
    ],
)
def test_nvidia_smi_error_is_not_a_driver_version(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for text, version in ((printed, None), ("555.42.06\n555.42.06", "555.42.06")):
        tool.write_text(f"#!/bin/sh\nprintf '%s\n' {shlex.quote(text)}\n")
        tool.chmod(0o755)
        assert nvidia_driver_version() == version


def test_reading_of_a_device_with_full_memory_is_parsed() -> None:
    (reading,) = parse_xpu_smi_m(new_line(0, 32768))
    assert (reading.used_mib, reading.total_mib) == (32768, 32768)
