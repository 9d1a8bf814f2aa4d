"""The node's reader of the monitor, and what is made of its table."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, List

import pytest

from lit_glm.config.schema import HardwareConfig, TopologyConfig, TrainConfig
from lit_glm.hardware import device_monitor
from lit_glm.hardware.device_monitor import (
    COLUMNS,
    MonitoredMemory,
    format_reading,
    load_readings,
    monitor_devices,
    monitor_for,
)
from lit_glm.hardware.monitors import MONITORS, DeviceReading, Monitor
from lit_glm.launch import launcher
from lit_glm.metrics.energy import energy_metrics, integrate_power
from lit_glm.runs import environment
from lit_glm.runs.job_spec import JobSpec

TOOL = """#!/bin/sh
for card in 0 1 2 3; do
  echo "0 $card x x 4$card x x x 10$card x x x x x x x x 2048 32768 97"
done
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A double of the vendor's tool: four cards, 100 to 103 W."""
    path = tmp_path / "bin" / "xpu-smi"
    path.parent.mkdir()
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return path


def hardware(runtime: str = "xmlir", every: float = 0.1) -> HardwareConfig:
    return HardwareConfig(name="x", runtimes=[runtime], monitor_interval_s=every)


def test_monitor_reads_the_devices_of_the_job_until_it_ends(
    tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPU_VISIBLE_DEVICES", "3,1,0")
    file, begun = tmp_path / "run" / "devices.csv", time.monotonic()
    memory = MonitoredMemory()
    memory.start(file, 1, MONITORS["xmlir"])
    with monitor_devices(hardware(), file, 0, 2, begun):
        limit = time.monotonic() + 20
        while len(load_readings(file).get(("0", "3"), [])) < 3 and time.monotonic() < limit:
            time.sleep(0.05)
    readings = load_readings(file)
    assert sorted(readings) == [("0", "1"), ("0", "3")]  # the first two visible ones
    first = readings["0", "3"][0]
    assert (first["power_w"], first["temperature_c"], first["utilisation"], first["mem_gib"]) == (103, 43, 97, 2)
    times = [reading["time_s"] or 0.0 for reading in readings["0", "3"]]
    assert len(times) >= 4
    assert times == sorted(times)
    assert memory.peak() == 2 * 2**30
    with monitor_devices(hardware(), file, 0, 2, begun - 100):  # a run that goes on
        pass
    longer = load_readings(file)["0", "3"]
    assert len(longer) > len(times)
    assert (longer[-1]["time_s"] or 0) > 100


def test_monitor_process_exits_with_its_run(tool: Path, tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom pathlib import Path\nfrom lit_glm.config.schema import HardwareConfig\n"
        "from lit_glm.hardware.device_monitor import monitor_devices\n"
        "hardware = HardwareConfig(name='x', runtimes=['xmlir'], monitor_interval_s=0.05)\n"
        f"with monitor_devices(hardware, Path({str(tmp_path / 'devices.csv')!r}), 0, 1, 0.0):\n"
        "    time.sleep(1)\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    time.sleep(0.5)
    before = (tmp_path / "devices.csv").stat().st_size
    time.sleep(0.5)
    assert before > 0
    assert (tmp_path / "devices.csv").stat().st_size == before


def test_simulated_devices_have_no_monitor() -> None:
    pretended = hardware()
    pretended.runtime = "simulated"
    assert monitor_for(pretended) is None
    assert monitor_for(hardware("cpu")) is not None


def test_incomplete_and_invalid_reading_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text(",".join(COLUMNS) + "\n1,0,0,2,100,,\nx,0,0,2,1,1,1\n2,0,0,2\n3,0,0,2,110,,\n4,0,0,2,10")
    assert [reading["time_s"] for reading in load_readings(file)["0", "0"]] == [1, 3]
    memory = MonitoredMemory()
    memory.start(file, 0, Monitor(lambda _: [], "NOTHING_VISIBLE"))
    assert memory.peak() == 2 * 2**30


def config(nodes: int, devices: int) -> TrainConfig:
    return TrainConfig(hardware=hardware(every=10.0), topology=TopologyConfig(nodes, devices))


def table(folder: Path, lines: List[str]) -> None:
    (folder / "devices.csv").write_text(",".join(COLUMNS) + "\n" + "".join(line + "\n" for line in lines))


def test_energy_is_the_integral_over_the_training_time(tmp_path: Path) -> None:
    # 100 W at 0 s rising to 200 W at 10 s, constant after; a second card at 50 W throughout.
    lines = ["0,0,0,1,100,40,", "10,0,0,1,200,60,", "20,0,0,1,200,50,", "0,0,1,1,50,30,", "20,0,1,1,50,30,"]
    table(tmp_path, lines)
    took = energy_metrics(tmp_path, config(1, 2), [[[5.0, 15.0]]], 35.0)
    assert took["energy_j"] == pytest.approx(5 * 175 + 5 * 200 + 10 * 50)
    assert took["samples_per_joule"] == pytest.approx(35 / took["energy_j"])
    assert took["power_mean_w"] == pytest.approx(took["energy_j"] / 10)
    assert (took["power_max_w"], took["temperature_max_c"]) == (200, 60)
    resumed = energy_metrics(tmp_path, config(1, 2), [[[0.0, 5.0], [15.0, 20.0]]], 35.0)
    assert resumed["energy_j"] == pytest.approx(5 * 125 + 5 * 200 + 10 * 50)


def test_first_devices_are_monitored_without_visibility_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_monitor.py"
    package.write_text(
        "from lit_glm.hardware.monitors import DeviceReading, Monitor\n"
        "MONITOR = Monitor(lambda _: [DeviceReading(index, 40.0, 100.0, None, None, None) for index in range(2)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(device_monitor, "_monitor_name", lambda _: "own_monitor.MONITOR")
    for devices, seen in ((1, ["0"]), (2, ["0", "1"])):
        folder = tmp_path / str(devices)
        with monitor_devices(hardware(), folder / "devices.csv", 0, devices, time.monotonic()):
            time.sleep(0.1)
        assert sorted(index for _, index in load_readings(folder / "devices.csv")) == seen
    table(tmp_path, ["0,0,0,1,100,40,", "20,0,0,1,100,40,"])
    assert energy_metrics(tmp_path, config(1, 2), [[[5.0, 15.0]]], 1.0)["energy_j"] is None  # one has no reading
    assert energy_metrics(tmp_path, config(1, 1), [[[5.0, 15.0]]], 1.0)["energy_j"] == 1000.0


def test_energy_is_null_if_any_device_has_no_readings(tmp_path: Path) -> None:
    table(tmp_path, ["0,0,0,1,100,40,", "20,0,0,1,100,40,", "0,0,1,1,,30,"])
    assert energy_metrics(tmp_path, config(1, 2), [[[5.0, 15.0]]], 1.0)["energy_j"] is None
    table(tmp_path, ["0,0,0,1,100,40,", "20,0,0,1,100,40,"])
    assert (
        energy_metrics(tmp_path, config(2, 1), [[[5.0, 15.0]]] * 2, 1.0)["energy_j"] is None
    )  # the other node's are missing
    assert (
        energy_metrics(tmp_path, config(1, 2), [[[5.0, 15.0]]], 1.0)["energy_j"] is None
    )  # a card that was never read
    table(tmp_path, ["0,0,0,1,100,40,", "0,0,1,1,100,40,"])
    assert energy_metrics(tmp_path, config(1, 1), [[[5.0, 15.0]]], 1.0)["energy_j"] is None  # another job's card beside
    table(tmp_path, ["0,0,0,1,100,40,"])
    assert energy_metrics(tmp_path, config(1, 1), [], 1.0)["energy_j"] is None
    assert integrate_power([], [[0.0, 1.0]], 5.0) is None


def test_power_outside_the_readings_uses_the_nearest_reading() -> None:
    readings = [{"time_s": 4.0, "power_w": 10.0}, {"time_s": 6.0, "power_w": 20.0}]
    found = integrate_power(readings, [[0.0, 10.0]], 2.0)
    assert found is not None
    assert found[0] == pytest.approx(4 * 10 + 2 * 15 + 4 * 20)
    assert found[1] == 8.0
    assert integrate_power(readings, [[0.0, 10.0]], 0.5) is None


def test_missing_readings_are_bridged_and_longer_gaps_are_not(tmp_path: Path) -> None:
    seconds = [time_s for time_s in range(0, 1001, 5) if time_s != 500]

    def took(times: List[int], silent: int = -1) -> Any:
        table(tmp_path, [f"{time_s},0,0,1,{'' if time_s == silent else 100},40," for time_s in times])
        return energy_metrics(tmp_path, TrainConfig(hardware=hardware(every=5.0)), [[[5.0, 995.0]]], 99.0)

    whole = took(list(range(0, 1001, 5)))
    assert (whole["energy_j"], whole["energy_bridged_share"]) == (pytest.approx(99_000), 0.0)
    for bridged in (took(seconds), took(list(range(0, 1001, 5)), silent=500)):
        assert bridged["energy_j"] == pytest.approx(99_000)
        assert bridged["energy_bridged_share"] == pytest.approx(10 / 990)
    assert took([time_s for time_s in seconds if not 480 < time_s < 505])["energy_j"] == pytest.approx(99_000)
    assert took([time_s for time_s in seconds if not 475 < time_s < 505])["energy_j"] == pytest.approx(99_000)  # five
    assert took([time_s for time_s in seconds if not 475 < time_s < 510])["energy_j"] is None


def test_time_between_run_parts_is_not_a_reading_gap(tmp_path: Path) -> None:
    times = [*range(0, 101, 5), *range(400, 501, 5)]
    table(tmp_path, [f"{time_s},0,0,1,{100 if time_s < 200 else 300},," for time_s in times])
    spans = [[[10.0, 102.0], [404.0, 490.0]]]
    found = energy_metrics(tmp_path, TrainConfig(hardware=hardware(every=5.0)), spans, 10.0)
    assert found["energy_j"] == pytest.approx(92 * 100 + 86 * 300)
    assert found["energy_bridged_share"] == 0.0
    table(tmp_path, [f"{time_s},0,0,1,100,," for time_s in times if not 40 < time_s < 80])
    assert energy_metrics(tmp_path, TrainConfig(hardware=hardware(every=5.0)), spans, 10.0)["energy_j"] is None


def test_values_that_are_not_finite_are_unknown(tmp_path: Path) -> None:
    nan, infinite = float("nan"), float("inf")
    assert format_reading(0.0, 0, DeviceReading(0, nan, infinite, nan, 1024.0, nan)) == "0.000,0,0,,,,\n"
    (tmp_path / "devices.csv").write_text(",".join(COLUMNS) + "\n0,0,0,nan,inf,nan,\n10,0,0,nan,inf,nan,\n")  # of 0.1.0
    memory = MonitoredMemory()
    memory.start(tmp_path / "devices.csv", 0, Monitor(lambda _: [], "NOTHING_VISIBLE"))
    assert memory.peak() is None
    took = energy_metrics(tmp_path, config(1, 1), [[[0.0, 10.0]]], 1.0)
    assert set(took.values()) == {None}


def test_each_node_has_its_own_training_time(tmp_path: Path) -> None:
    """The second node was started 60 s before the first: its clock is 60 s ahead."""
    table(tmp_path, [f"{time_s},0,0,1,100,," for time_s in range(0, 31, 5)])
    (tmp_path / "nodes" / "1").mkdir(parents=True)
    table(tmp_path / "nodes" / "1", [f"{time_s},1,0,1,{20 if time_s < 65 else 100},," for time_s in range(0, 91, 5)])
    two = TrainConfig(hardware=hardware(every=5.0), topology=TopologyConfig(2, 1))
    found = energy_metrics(tmp_path, two, [[[5.0, 25.0]], [[65.0, 85.0]]], 10.0)
    assert found["energy_j"] == pytest.approx(2 * 20 * 100)
    assert found["power_mean_w"] == pytest.approx(200)


def test_device_readings_are_not_used_for_a_mig_slice(tmp_path: Path) -> None:
    one = TrainConfig(hardware=HardwareConfig(name="x", runtimes=["cuda"]))
    table(tmp_path, [f"{time_s},0,0,1,700,," for time_s in range(0, 31, 5)])
    assert energy_metrics(tmp_path, one, [[[5.0, 25.0]]], 10.0)["energy_j"] == pytest.approx(14_000)
    assert energy_metrics(tmp_path, one, [[[5.0, 25.0]]], 10.0, sliced=True)["energy_j"] is None
    table(tmp_path, [f"{time_s},0,MIG-abc,1,50,," for time_s in range(0, 31, 5)])
    assert energy_metrics(tmp_path, one, [[[5.0, 25.0]]], 10.0, sliced=True)["energy_j"] == pytest.approx(1000)


def test_run_stopped_before_training_has_no_mean_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its first evaluation: no sample, no second of training, and no error on the way out."""
    monkeypatch.setattr(launcher, "monitor_node_devices", lambda *_: nullcontext())
    table(tmp_path, ["0,0,0,1,100,40,", "20,0,0,1,100,40,"])
    (tmp_path / "result.json").write_text('{"status": "interrupted", "training_spans": [[5, 5]]}')
    with launcher.write_energy_metrics(JobSpec(config(1, 1), 0.0, []), tmp_path):
        pass
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["power_mean_w"] is None or result["samples_per_joule"] is None
    assert "W on the average" not in capsys.readouterr().out


def test_readings_after_the_last_record_of_a_killed_part_do_not_count(tmp_path: Path) -> None:
    """The next part's times begin at that record: the readings of both would be mixed."""
    table(tmp_path, [f"{time_s},0,0,1,{50 if time_s > 20 else 100},," for time_s in range(0, 61, 5)])
    result = {"status": "failed", "e2e_time": 20.0, "training_spans": [[5.0, 20.0]]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    with launcher.monitor_node_devices(JobSpec(config(1, 1), time.monotonic(), [], is_resume=True), tmp_path, 0):
        pass
    (readings,) = load_readings(tmp_path / "devices.csv").values()
    assert [reading["time_s"] for reading in readings] == [0.0, 5.0, 10.0, 15.0, 20.0]


def test_report_driver_overrides_the_detected_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep compares it with environment.json, where it stands too."""
    double = Monitor(lambda _: [], "X_VISIBLE_DEVICES", lambda: {0: "card"}, lambda: "1.2")
    monkeypatch.setattr(environment, "monitor_for", lambda _: double)
    one = config(1, 1)
    assert environment.local_environment(one)["driver"] == "1.2"
    one.report.driver = "1.2 LTS"
    assert environment.local_environment(one)["driver"] == "1.2 LTS"


def test_row_that_is_being_written_is_read_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = tmp_path / "devices.csv", MonitoredMemory()
    monkeypatch.delenv("X_VISIBLE_DEVICES", raising=False)
    memory.start(file, 0, Monitor(lambda _: [], "X_VISIBLE_DEVICES", lambda: {0: "card"}, lambda: None))
    file.write_text(",".join(COLUMNS) + "\n0.0,0,0,1.5,,,\n1.0,0,0,2")
    memory.update()
    assert memory.last == 1.5 * 2**30
    with file.open("a") as rest:
        rest.write("0.5,,,\n")
    memory.update()
    assert (memory.last, memory.peak()) == (20.5 * 2**30, 20.5 * 2**30)
