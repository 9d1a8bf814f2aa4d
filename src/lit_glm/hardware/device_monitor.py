"""One reader of the monitor a node: a process of its own, started before torch, that writes devices.csv.

A rank that asked the vendor's tool itself would fork a large process every time. The ranks read the file instead.
Nothing here imports torch. As a program: `python -m lit_glm.hardware.device_monitor MONITOR FILE NODE
EVERY_S BEGUN CARDS`; it
reads until its standard input is closed, and once more then.
"""

import importlib
import math
import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from lit_glm.config.schema import HardwareConfig
from lit_glm.hardware.monitors import MONITORS, DeviceReading, Monitor, nvml_device, visible_device
from lit_glm.process_utils import set_parent_death_signal

DEVICES_FILE = "devices.csv"
COLUMNS = ("time_s", "node", "device", "mem_gib", "power_w", "temperature_c", "utilisation")
_ALL = "-"
_LAST_S = 15.0  # a monitor that hangs must not hold up the end of a run


def monitor_for(hardware: HardwareConfig) -> Optional[Monitor]:
    """What can be asked of a chip's cards; None where they are pretended, or nothing is known to ask.

    Which runtime auto will take is not known yet: of those with the same tool, the one whose variable hides cards.
    """
    name = _monitor_name(hardware)
    return None if name is None else monitor_of_name(name)


def _monitor_name(hardware: HardwareConfig) -> Optional[str]:
    if hardware._target_ is not None and hardware.runtime != "simulated":
        from lit_glm.hardware.runtimes.selection import import_runtime_class

        return import_runtime_class(hardware._target_).monitor or None
    names = hardware.runtimes if hardware.runtime == "auto" else [hardware.runtime]
    known = [name for name in names if name in MONITORS]
    chosen = (name for name in known if MONITORS[name].visible_devices_variable in os.environ)
    return next(chosen, known[0] if known else None)


def monitor_of_name(name: str) -> Monitor:
    """A monitor by its runtime's name, or by package.module.NAME of a package outside this one."""
    if name in MONITORS:
        return MONITORS[name]
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, Monitor):
        raise TypeError(f"{name} is no lit_glm.hardware.monitors.Monitor")
    return found


def readings_file(run_dir: Path, node: int) -> Path:
    """Where the readings of a node are."""
    return run_dir / DEVICES_FILE if node == 0 else run_dir / "nodes" / str(node) / DEVICES_FILE


@contextmanager
def monitor_devices(hardware: HardwareConfig, file: Path, node: int, devices: int, begun: float) -> Iterator[None]:
    """Have the cards of a node read as long as this lasts.

    Args:
        hardware: names the monitor and its interval.
        file: a table that is begun, or continued.
        node: number of the node, from 0.
        devices: cards of it in use; the first visible ones.
        begun: `time.monotonic()` at which `time_s` is 0.
    """
    name = _monitor_name(hardware)
    if name is None:
        yield
        return
    monitor = monitor_of_name(name)
    wanted = _ALL
    if monitor.visible_devices_variable:
        visible = [visible_device(index, monitor.visible_devices_variable) for index in range(devices)]
        wanted = ",".join(card for card in map(monitor.resolve, visible) if card is not None)
    arguments = [name, str(file), str(node), repr(hardware.monitor_interval_s), repr(begun), wanted]
    watch = subprocess.Popen(
        [sys.executable, "-m", "lit_glm.hardware.device_monitor", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the run's; this one ends by its input
    )
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()
        try:
            watch.wait(timeout=_LAST_S)
        except subprocess.TimeoutExpired:
            watch.kill()


def _format_number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.9g}"


def format_reading(time_s: float, node: int, reading: DeviceReading) -> str:
    """A line of the table."""
    gib = None if reading.used_mib is None else reading.used_mib / 1024
    values = (gib, reading.power_w, reading.temperature_c, reading.utilisation)
    return ",".join([f"{time_s:.3f}", str(node), str(reading.index), *map(_format_number, values)]) + "\n"


def main(arguments: List[str]) -> int:
    """Read until nobody wants it any more."""
    set_parent_death_signal()
    name, path, node, every, begun, wanted = arguments
    cards = None if wanted == _ALL else [card for card in wanted.split(",") if card]
    read, file = monitor_of_name(name).read, Path(path)
    begins = not file.exists() or file.stat().st_size == 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as table:
        if begins:
            table.write(",".join(COLUMNS) + "\n")
        ended, due = False, time.monotonic()
        while True:
            for reading in read(cards):
                if cards is None or str(reading.index) in cards:
                    table.write(format_reading(time.monotonic() - float(begun), int(node), reading))
            table.flush()
            if ended:
                return 0
            due = max(due + float(every), time.monotonic() + 0.05)
            while not ended and time.monotonic() < due:
                ready, _, _ = select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))
                ended = bool(ready) and not os.read(0, 4096)


class MonitoredMemory:
    """Memory of a rank's card as the node's watch has written it; reads what is new in the file, and asks nobody."""

    def __init__(self) -> None:
        self._file: Optional[Path] = None
        self._card: Optional[str] = None
        self._read_to = 0
        self.last: Optional[float] = None
        """Newest reading, bytes."""
        self._peak: Optional[float] = None

    def start(self, file: Path, index: int, visible: str) -> None:
        """Name the file; what an earlier part of the run has left there counts for the peak.

        Args:
            file: of the node.
            index: of the device among the visible ones.
            visible: the variable that says which cards are visible.
        """
        name = visible_device(index, visible)
        self._file, self._card = file, (name if name.isdigit() else nvml_device(name))

    def update(self) -> None:
        """Take what has been written meanwhile."""
        if self._file is None or self._card is None or not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._read_to += len(complete)
        for line in complete.decode("utf-8", errors="replace").splitlines():
            fields = line.split(",")
            if len(fields) == len(COLUMNS) and fields[2] == self._card and fields[3]:
                self.last = float(fields[3]) * 2**30
                self._peak = max(self._peak or 0.0, self.last)

    def peak(self) -> Optional[float]:
        """Largest reading, bytes; None without one."""
        self.update()
        return self._peak


def load_readings(file: Path) -> Dict[Tuple[str, str], List[Dict[str, Optional[float]]]]:
    """Readings of each (node, card), in the order of their times; torn lines are left out."""
    found: Dict[Tuple[str, str], List[Dict[str, Optional[float]]]] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        return found
    for line in lines:
        fields = line.split(",")
        if len(fields) != len(COLUMNS):
            continue
        try:
            values = [float(field) if field else None for field in (fields[0], *fields[3:])]
        except ValueError:
            continue
        if values[0] is None or not math.isfinite(values[0]):
            continue
        found.setdefault((fields[1], fields[2]), []).append(dict(zip((COLUMNS[0], *COLUMNS[3:]), values)))
    for readings in found.values():
        readings.sort(key=lambda reading: reading["time_s"] or 0.0)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
