"""What the vendor's monitor prints, good and broken, and the thread that keeps the largest reading."""

import doctest
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Optional, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.hardware import monitors
from lit_glm.hardware.monitors import (
    MemoryWatch,
    card_of,
    nvml_memory,
    parse_names,
    parse_xpu_smi,
    parse_xpu_smi_m,
    xpu_memory,
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


def test_the_examples_in_the_documentation() -> None:
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


def test_names_of_cards() -> None:
    text = "\n".join(["a head line", new_line(0, 1), new_line(5, "N/A"), '"nobody"'])
    assert parse_names(text) == {0: "KUNLUN R300", 5: "KUNLUN R300"}


@given(st.text())
def test_names_of_any_text(text: str) -> None:
    assert all(name in text for name in parse_names(text).values())


@pytest.mark.parametrize(("visible", "card"), [("", 1), ("4,7", 7), ("4", 1), ("4, 7 ", 7), ("GPU-a,GPU-b", None)])
def test_a_visible_device_is_a_card_of_the_machine(
    visible: str, card: Optional[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VISIBLE_DEVICES", visible)
    assert card_of(1, "SOME_VISIBLE_DEVICES") == card


def test_the_tool_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "xpu-smi"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -m ] && echo '{new_line(0, 2048)}'\n")
    tool.chmod(0o755)
    assert xpu_memory() == {}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert xpu_memory() == {0: (2048 * 2**20, 32768 * 2**20)}


def test_what_the_tool_prints_need_not_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "xpu_smi"
    tool.write_text(f"#!/bin/sh\nprintf 'xpu_smi 4.0, 46 \\260C\\n'\necho '{old_line('2048MiB')}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert xpu_memory() == {0: (2048 * 2**20, 32768 * 2**20)}  # the heading has the word, and is no card


def test_nvml_by_a_double_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card was in reach: the double has the functions of nvidia-ml-py that are called."""
    used = {0: 5 * 2**30, 1: 7 * 2**30}
    double = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(used),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used[handle], total=80 * 2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", double)
    assert nvml_memory() == {0: (5 * 2**30, 80 * 2**30), 1: (7 * 2**30, 80 * 2**30)}

    def fails() -> None:
        raise RuntimeError("driver not loaded")

    double.nvmlInit = fails
    assert nvml_memory() == {}


def test_the_largest_reading_of_a_visible_card_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([100.0, 300.0, 200.0])
    last = [100.0]

    def read() -> Dict[int, Tuple[float, float]]:
        last[0] = next(values, last[0])
        return {0: (9.0, 1000.0), 5: (last[0], 1000.0)}

    monkeypatch.setenv("SOME_VISIBLE_DEVICES", "5,0")
    watch = MemoryWatch(read, every_s=0.01)
    watch.start(0, "SOME_VISIBLE_DEVICES")
    limit = time.monotonic() + 10
    while watch.peak(0) != 300.0 and time.monotonic() < limit:
        time.sleep(0.01)
    assert (watch.peak(0), watch.total(0)) == (300.0, 1000.0)


def test_without_a_monitor_there_is_no_figure() -> None:
    watch = MemoryWatch(dict)
    watch.start(0, "SOME_VISIBLE_DEVICES")
    assert (watch.peak(0), watch.total(0)) == (None, None)
