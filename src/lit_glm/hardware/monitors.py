"""Monitors of devices: memory, power, temperature, utilisation. Does not import torch.

Two output formats of Kunlunxin's tool are known, for older and newer drivers; both print one line per device, fields
separated by white space. A line that does not match is skipped: an unknown format gives no values, not wrong ones.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import psutil

_MIB = 2**20
_FIRST_S = 0.1  # between the first two readings of a counter


@dataclass(frozen=True)
class DeviceReading:
    """Reading of one device at one moment."""

    index: Union[int, str]
    """Index of the device in the machine; the name of a MIG slice."""
    temperature_c: Optional[float]
    power_w: Optional[float]
    used_mib: Optional[float]
    total_mib: Optional[float]
    utilisation: Optional[float]
    """Utilisation in percent."""


def _parse_number(field: str, unit: str = "") -> float:
    text = field[: -len(unit)] if unit and field.endswith(unit) else field
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(field)
    return value


def _parse_readings(
    lines: Sequence[str], fields: Tuple[int, ...], index_of: Callable[[List[str], int], int]
) -> List[DeviceReading]:
    """Parse lines by the field numbers of temperature, power, used, total, utilisation (from 1)."""
    readings: List[DeviceReading] = []
    for number, line in enumerate(lines):
        words = line.split()
        try:
            temperature, power, used, total, utilisation = (words[place - 1] for place in fields)
            reading = DeviceReading(
                index_of(words, number),
                _parse_number(temperature, "C"),
                _parse_number(power, "W"),
                _parse_number(used, "MiB"),
                _parse_number(total, "MiB"),
                _parse_number(utilisation, "%"),
            )
        except (IndexError, ValueError):
            continue
        if 0 < (reading.total_mib or 0.0) >= (reading.used_mib or 0.0):
            readings.append(reading)
    return readings


def parse_xpu_smi_m(text: str) -> List[DeviceReading]:
    """Parse `xpu-smi -m` of newer drivers: fields 2 index, 5 C, 9 W, 18 used, 19 total (MiB), 20 %.

    >>> parse_xpu_smi_m("0 3 x x 46 x x x 114 x x x x x x x x 23730 32768 100")[0]
    DeviceReading(index=3, temperature_c=46.0, power_w=114.0, used_mib=23730.0, total_mib=32768.0, utilisation=100.0)
    >>> parse_xpu_smi_m("0 3 x x 46 x x x 114 x x x x x x x x lots 32768 100")
    []
    """
    return _parse_readings(text.splitlines(), (5, 9, 18, 19, 20), lambda words, _: int(words[1]))


def parse_xpu_smi(text: str) -> List[DeviceReading]:
    """Parse `xpu_smi` of older drivers: devices in order, one line each, with "xpu" and at least 29 fields.

    Fields 29 C, 27 W, 22 used, 24 total (MiB), 14 %. A line of that shape that cannot be parsed still counts.

    >>> line = "xpu " + "x " * 12 + "100% " + "x " * 7 + "23730MiB x 32768MiB x x 114W x 46C"
    >>> parse_xpu_smi(line)[0].used_mib
    23730.0
    >>> parse_xpu_smi("no such device")
    []
    """
    lines = [line for line in text.splitlines() if "xpu" in line and len(line.split()) >= 29]
    return _parse_readings(lines, (29, 27, 22, 24, 14), lambda _, number: number)


def command_output(*command: str) -> str:
    """Return a program's stripped output; empty if it is missing or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
        return done.stdout.decode("utf-8", errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def read_system_file(path: "str | Path") -> str:
    """Return the stripped content of a small file of the kernel; empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def xpu_readings() -> List[DeviceReading]:
    """Read the devices with whichever of the vendor's tools is installed; empty without one."""
    for tool, parse in ((("xpu-smi", "-m"), parse_xpu_smi_m), (("xpu_smi",), parse_xpu_smi)):
        if shutil.which(tool[0]):
            readings = parse(command_output(*tool))
            if readings:
                return readings
    return []


def xpu_total_memory(device: Optional[int]) -> Optional[float]:
    """Return the memory of a device in bytes, from the vendor's tool; None if not reported."""
    totals = {entry.index: entry.total_mib for entry in xpu_readings()}
    mib = None if device is None else totals.get(device)
    return None if mib is None else mib * _MIB


def parse_names(text: str) -> Dict[int, str]:
    """Parse device names from `xpu-smi -m`: text in double quotes, by field 2.

    >>> parse_names('0 3 x x 46 x x x 114 x x x x x x x x 23730 32768 100 x "KUNLUN R300"')
    {3: 'KUNLUN R300'}
    >>> parse_names("no device")
    {}
    """
    names = {}
    for line in text.splitlines():
        words, name = line.split(), re.search(r'"([^"]+)"', line)
        if name and len(words) > 1 and words[1].isdigit():
            names[int(words[1])] = name.group(1)
    return names


def xpu_device_names() -> Dict[int, str]:
    """Return the name of each device; empty if the vendor's tool is missing, or reports none."""
    return parse_names(command_output("xpu-smi", "-m"))


def visible_device(index: int, visible: str) -> str:
    """Return the entry of a visible-devices variable for an index: a number, a UUID, or a MIG name."""
    names = os.environ.get(visible, "").split(",")
    return (names[index].strip() if index < len(names) else "") or str(index)


def physical_device_index(index: int, visible: str) -> Optional[int]:
    """Return the index of a visible device in the machine; None if the variable uses other names (UUIDs)."""
    name = visible_device(index, visible)
    return int(name) if name.isdigit() else None


def is_mig_slice(name: str) -> bool:
    """Return whether a device name is that of a MIG slice, as in "NVIDIA H100 80GB HBM3 MIG 1g.10gb"."""
    return " MIG " in f" {name} "


def parse_driver(text: str) -> Optional[str]:
    """Parse the driver version from `xpu-smi -q`.

    >>> parse_driver("Driver Version                  : 4.0.25")
    '4.0.25'
    >>> parse_driver("no driver")
    """
    match = re.search(r"^\s*driver version\s*:\s*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return match.group(1) if match else None


def xpu_driver_version() -> Optional[str]:
    """Return the version of the XPU driver, from whichever of the vendor's tools is installed."""
    for tool in ("xpu-smi", "xpu_smi"):
        if shutil.which(tool):
            version = parse_driver(command_output(tool, "-q"))
            if version:
                return version
    return None


def _nvml_handles(visible_devices: Optional[Sequence[str]] = None) -> Dict[Union[int, str], Any]:
    """Return NVML handles of NVIDIA devices and MIG slices; empty without the package nvidia-ml-py or a driver.

    Args:
        visible_devices: names as in CUDA_VISIBLE_DEVICES; None: all devices.

    Returns:
        Handles by the device's index, or by the name of a slice. Devices that NVML does not know are left out.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        devices: Dict[Union[int, str], Any] = {
            index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        }
    except Exception:  # no package, no driver, or an incompatible driver
        return {}
    if visible_devices is None:
        return devices
    handles: Dict[Union[int, str], Any] = {}
    for name in visible_devices:
        if name.isdigit():
            handles.update({key: handle for key, handle in devices.items() if key == int(name)})
        elif name.startswith("MIG-"):
            try:
                handles[name] = pynvml.nvmlDeviceGetHandleByUUID(name)
            except Exception:  # no such slice
                continue
        else:  # CUDA also accepts a unique prefix of a UUID
            uuids = {key: _decoded(pynvml.nvmlDeviceGetUUID(handle)) for key, handle in devices.items()}
            matching = [key for key, uuid in uuids.items() if uuid.startswith(name)]
            handles.update({matching[0]: devices[matching[0]]} if len(matching) == 1 else {})
    return handles


def _decoded(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def is_mig_enabled(handle: Any) -> bool:
    """Return whether an NVIDIA device is divided into MIG slices."""
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == 1)
    except Exception:  # a device without MIG
        return False


def nvml_readings(visible_devices: Optional[Sequence[str]] = None) -> List[DeviceReading]:
    """Read NVIDIA devices and slices by NVML; values that are not reported are None.

    Args:
        visible_devices: names as in CUDA_VISIBLE_DEVICES; None: all devices.
    """
    devices = _nvml_handles(visible_devices)
    if not devices:
        return []
    import pynvml

    def value_or_none(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception:  # not reported by this device
            return None

    readings = []
    for index, handle in devices.items():
        # A process gets a slice of such a device: these would be the whole device's.
        if isinstance(index, int) and is_mig_enabled(handle):
            readings.append(DeviceReading(index, None, None, None, None, None))
            continue
        # Version 2 excludes memory reserved by the driver, as nvidia-smi does.
        memory = value_or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))  # noqa: B023
        memory = memory or value_or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))  # noqa: B023
        warmth = value_or_none(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))  # noqa: B023
        milliwatts = value_or_none(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))  # noqa: B023
        rates = value_or_none(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))  # noqa: B023
        readings.append(
            DeviceReading(
                index,
                None if warmth is None else float(warmth),
                None if milliwatts is None else milliwatts / 1000.0,
                None if memory is None else memory.used / _MIB,
                None if memory is None else memory.total / _MIB,
                None if rates is None else float(rates.gpu),
            )
        )
    return readings


def nvml_device_names() -> Dict[int, str]:
    """Return the name of each NVIDIA device; empty without the package nvidia-ml-py or a driver."""
    try:
        import pynvml

        handles = _nvml_handles()
        return {int(index): _decoded(pynvml.nvmlDeviceGetName(handle)) for index, handle in handles.items()}
    except Exception:  # no package
        return {}


def nvidia_driver_version() -> Optional[str]:
    """Return the NVIDIA driver version from nvidia-smi; None for any other output, such as an error."""
    text = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    first = text.splitlines()[0].strip() if text else ""
    return first if re.fullmatch(r"\d+(\.\d+)+", first) else None


def nvml_processes(index: int, visible: str) -> Optional[int]:
    """Count the compute processes on a visible NVIDIA device; None without the package nvidia-ml-py or a driver."""
    try:
        import pynvml

        name = visible_device(index, visible)
        (handle,) = _nvml_handles([name]).values()
        if not name.startswith("MIG-") and is_mig_enabled(handle):  # the device has the processes of all its slices
            return None
        return len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except Exception:  # no package, no driver, or no permission to list processes
        return None


def nvml_device(name: str) -> Optional[str]:
    """Map a name in CUDA_VISIBLE_DEVICES to the name in devices.csv: the index, or the name of a MIG slice."""
    if name.isdigit():
        return name
    return next((str(key) for key in _nvml_handles([name])), None)


def numbered_device(name: str) -> Optional[str]:
    """Map a device name to the name in devices.csv, if devices are selected by number; else None."""
    return name if name.isdigit() else None


def cpu_info(*keys: str) -> str:
    """Return the kernel's first entry under one of some keys, such as `model name`; "" if there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(keys))
    except (OSError, StopIteration):
        return ""


def cpu_name() -> str:
    """Return the CPU model name as the kernel reports it; "" if unknown."""
    return cpu_info("model name")


class CPUMonitor:
    """Monitor of the CPU packages: power from the kernel's powercap files (Intel and AMD), memory of the machine."""

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._powercap = powercap
        self._before: Dict[str, Tuple[float, float]] = {}

    def readings(self) -> List[DeviceReading]:
        """Return one reading per package; without power if the kernel does not report it, or not to this user."""
        memory = psutil.virtual_memory()
        used, total, busy = (memory.total - memory.available) / _MIB, memory.total / _MIB, psutil.cpu_percent()
        powers = [self._power(zone) for zone in self._packages()] or [None]
        return [DeviceReading(index, None, power, used, total, busy) for index, power in enumerate(powers)]

    def _packages(self) -> List[Path]:
        zones = sorted(self._powercap.glob("intel-rapl:*")) if self._powercap.is_dir() else []
        return [zone for zone in zones if read_system_file(zone / "name").startswith("package")]

    def _power(self, zone: Path) -> Optional[float]:
        """Return the mean power since the previous reading; the first call takes two readings. None if unreadable."""
        text, now = read_system_file(zone / "energy_uj"), time.monotonic()
        if not text.isdigit():
            return None
        before = self._before.get(str(zone))
        self._before[str(zone)] = (now, float(text))
        if before is None:
            time.sleep(_FIRST_S)
            return self._power(zone)
        taken = float(text) - before[1]
        if taken < 0:  # the counter has wrapped around
            taken += float(read_system_file(zone / "max_energy_range_uj") or 0.0)
        return taken / 1e6 / (now - before[0]) if now > before[0] and taken >= 0 else None


@dataclass(frozen=True)
class Monitor:
    """Functions that read the devices of a runtime."""

    read: Callable[[Optional[Sequence[str]]], List[DeviceReading]]
    """Reads the given devices, named as by `resolve`; may return more."""
    visible_devices_variable: Optional[str] = ""
    """Variable that selects the visible devices; "": none, a job uses the first ones; None: ranks share one reading."""
    device_names: Callable[[], Dict[int, str]] = dict
    """Names of the machine's devices by their index."""
    driver_version: Callable[[], Optional[str]] = lambda: None
    resolve: Callable[[str], Optional[str]] = numbered_device
    """Maps a device name in the variable to that of its readings; None if not found."""


CPU_MONITOR = CPUMonitor()
MONITORS: Dict[str, Monitor] = {
    "xmlir": Monitor(lambda _: xpu_readings(), "XPU_VISIBLE_DEVICES", xpu_device_names, xpu_driver_version),
    "xpytorch": Monitor(lambda _: xpu_readings(), "CUDA_VISIBLE_DEVICES", xpu_device_names, xpu_driver_version),
    "cuda": Monitor(nvml_readings, "CUDA_VISIBLE_DEVICES", nvml_device_names, nvidia_driver_version, nvml_device),
    "cpu": Monitor(lambda _: CPU_MONITOR.readings(), None),
}
"""Monitors by runtime name."""
