"""Device monitor: one process per node, started before torch, that writes devices.csv.

Each query by a rank itself would fork a large process, so the ranks read the file instead. Does not import torch.
`python -m lit_glm.hardware.device_monitor MONITOR FILE NODE EVERY_S START_TIME DEVICES` reads the devices until its
standard input is closed, and once more after that.
"""

import importlib
import logging
import math
import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Optional, Tuple

from lit_glm.atomic_files import read_csv_rows, write_text
from lit_glm.errors import InputError, first_line
from lit_glm.hardware.monitors import MONITORS, DeviceReading, Monitor, visible_device
from lit_glm.process_utils import set_parent_death_signal

if TYPE_CHECKING:  # each run starts a process of this module, which reads no configuration
    from lit_glm.config.schema import HardwareConfig

log = logging.getLogger(__name__)

DEVICES_FILE = "devices.csv"
COLUMNS = ("time_s", "node", "device", "mem_gib", "power_w", "temperature_c", "utilisation")
_ALL = "-"
_STOP_TIMEOUT_S = 15.0  # a hanging monitor must not delay the end of a run


def monitor_for(hardware: "HardwareConfig") -> Optional[Monitor]:
    """Return the monitor of a hardware configuration; None for simulated devices, or without a known monitor.

    With `auto`, the runtime is not known yet: prefer the one whose visible-devices variable is set, else the first.
    """
    name = _monitor_name(hardware)
    return None if name is None else monitor_of_name(name)


def _monitor_name(hardware: "HardwareConfig") -> Optional[str]:
    if hardware._target_ is not None and hardware.runtime != "simulated":
        from lit_glm.hardware.runtimes.selection import import_runtime_class

        return import_runtime_class(hardware._target_).monitor or None
    names = hardware.runtimes if hardware.runtime == "auto" else [hardware.runtime]
    known = [name for name in names if name in MONITORS]
    chosen = (name for name in known if (MONITORS[name].visible_devices_variable or "") in os.environ)
    return next(chosen, known[0] if known else None)


def monitor_of_name(name: str) -> Monitor:
    """Return a monitor by its runtime's name, or by package.module.NAME of an external package.

    Raises:
        InputError: if there is no such monitor.
    """
    if name in MONITORS:
        return MONITORS[name]
    module, _, attribute = name.rpartition(".")
    try:
        monitor = getattr(importlib.import_module(module), attribute) if module else None
    except Exception as error:  # whatever a user's package raises
        raise InputError(
            f"monitor {name} of the runtime: cannot be imported ({first_line(error)}); correct Runtime.monitor"
        ) from error
    if not isinstance(monitor, Monitor):
        raise InputError(
            f"monitor {name} of the runtime: is no lit_glm.hardware.monitors.Monitor; Runtime.monitor is "
            "package.module.NAME of one (docs/new_chip.md)"
        )
    return monitor


def readings_file(run_dir: Path, node: int) -> Path:
    """Return the path of the readings of a node."""
    return run_dir / DEVICES_FILE if node == 0 else run_dir / "nodes" / str(node) / DEVICES_FILE


def drop_readings_after(file: Path, seconds: float) -> None:
    """Drop the readings that a part of a run took after its last record: the next part's times begin at that record."""
    if not file.is_file():
        return
    head, *lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    kept = []
    for line in lines:
        try:
            kept += [line] if float(line.partition(",")[0]) <= seconds else []
        except ValueError:  # cut off
            continue
    if len(kept) < len(lines):
        write_text(file, "".join([head, *kept]))


@contextmanager
def monitor_devices(
    hardware: "HardwareConfig", file: Path, node: int, devices: int, start_time: float
) -> Iterator[None]:
    """Monitor the devices of a node for the duration of the context.

    Args:
        hardware: configuration of the monitor and its interval.
        file: table to create or to continue.
        node: number of the node, from 0.
        devices: number of its devices in use; the first visible ones.
        start_time: `time.monotonic()` at which `time_s` is 0.
    """
    name = _monitor_name(hardware)
    if name is None:
        yield
        return
    monitor = monitor_of_name(name)
    chosen = _ALL
    if monitor.visible_devices_variable is not None:
        visible = [visible_device(index, monitor.visible_devices_variable) for index in range(devices)]
        chosen = ",".join(device_name for device_name in map(monitor.resolve, visible) if device_name is not None)
    arguments = [name, str(file), str(node), repr(hardware.monitor_interval_s), repr(start_time), chosen]
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_glm.hardware.device_monitor", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run; this process ends when its stdin closes
    )
    try:
        yield
    finally:
        try:
            problem, _ = process.communicate(timeout=_STOP_TIMEOUT_S)  # closes its standard input
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problem = f"a reading took more than {_STOP_TIMEOUT_S:g} s"
        if problem:
            log.warning(f"device monitor {name}: {problem.strip()}; {file.name} lacks readings")


def _format_number(value: Optional[float]) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.9g}"


def _parse_number(text: str) -> Optional[float]:
    try:
        value = float(text)
    except ValueError:  # empty, or cut off
        return None
    return value if math.isfinite(value) else None


def format_reading(time_s: float, node: int, reading: DeviceReading) -> str:
    """Format a row of the table."""
    gib = None if reading.used_mib is None else reading.used_mib / 1024
    values = (gib, reading.power_w, reading.temperature_c, reading.utilisation)
    return ",".join([f"{time_s:.3f}", str(node), str(reading.index), *map(_format_number, values)]) + "\n"


def main(arguments: List[str]) -> int:
    """Read the devices until standard input is closed."""
    set_parent_death_signal()
    name, path, node, every, start_time, chosen = arguments
    devices = None if chosen == _ALL else [device for device in chosen.split(",") if device]
    read, file = monitor_of_name(name).read, Path(path)
    is_new_file = not file.exists() or file.stat().st_size == 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as table:
        if is_new_file:
            table.write(",".join(COLUMNS) + "\n")
        ended, due, problem = False, time.monotonic(), ""
        while True:
            try:
                for reading in read(devices):
                    if devices is None or str(reading.index) in devices:
                        table.write(format_reading(time.monotonic() - float(start_time), int(node), reading))
            except Exception as error:  # a user's monitor; the next reading may succeed
                problem = problem or f"a reading failed ({type(error).__name__}: {first_line(error)})"
            table.flush()
            if ended:
                print(problem, end="")
                return 0
            due = max(due + float(every), time.monotonic() + 0.05)
            while not ended and time.monotonic() < due:
                ready, _, _ = select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))
                ended = bool(ready) and not os.read(0, 4096)


class MonitoredMemory:
    """Memory of a rank's device, read incrementally from the file of the node's device monitor."""

    def __init__(self) -> None:
        self._file: Optional[Path] = None
        self._device: Optional[str] = None
        self._read_to = 0
        self.last: Optional[float] = None
        """Latest reading, bytes."""
        self._peak: Optional[float] = None

    def start(self, file: Path, index: int, monitor: Monitor) -> None:
        """Set the file; readings from earlier parts of the run count for the peak.

        Args:
            file: devices.csv of the node.
            index: index of the device among the visible ones.
            monitor: the monitor that writes the file.
        """
        name = visible_device(index, monitor.visible_devices_variable or "")
        self._file, self._device = file, monitor.resolve(name)

    def update(self) -> None:
        """Read new rows of the file."""
        if self._file is None or self._device is None or not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._read_to += len(complete)
        for line in complete.decode("utf-8", errors="replace").splitlines():
            fields = line.split(",")
            gib = _parse_number(fields[3]) if len(fields) == len(COLUMNS) and fields[2] == self._device else None
            if gib is not None:
                self.last = gib * 2**30
                self._peak = max(self._peak or 0.0, self.last)

    def peak(self) -> Optional[float]:
        """Return the largest reading, bytes; None without one."""
        self.update()
        return self._peak


def load_readings(file: Path) -> Dict[Tuple[str, str], List[Dict[str, Optional[float]]]]:
    """Load the readings of each (node, device), ordered by time; truncated rows are skipped."""
    readings_of_device: Dict[Tuple[str, str], List[Dict[str, Optional[float]]]] = {}
    try:
        rows = read_csv_rows(file, COLUMNS)
    except OSError:
        rows = []
    for row in rows:
        reading = {name: _parse_number(row[name]) for name in COLUMNS if name not in ("node", "device")}
        if reading["time_s"] is not None:
            readings_of_device.setdefault((row["node"], row["device"]), []).append(reading)
    for readings in readings_of_device.values():
        readings.sort(key=lambda reading: reading["time_s"] or 0.0)
    return readings_of_device


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
