"""Device memory as the vendor's monitor sees it: parsers of its output, and a thread that keeps the largest reading.

Two formats of Kunlunxin's tool are known, by the driver's age; both print one line a card with fields separated by
white space. A line that does not fit is left out: a monitor in an unknown format gives no figure, not a wrong one.
"""

import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

_MIB = 2**20
_SAMPLE_EVERY_S = 1.0  # FlagPerf's monitor takes a reading every 5 s


@dataclass(frozen=True)
class Reading:
    """One card at one moment."""

    index: int
    temperature_c: float
    power_w: float
    used_mib: float
    total_mib: float
    utilisation: float


def _number(field: str, unit: str = "") -> float:
    text = field[: -len(unit)] if unit and field.endswith(unit) else field
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(field)
    return value


def _readings(
    lines: Sequence[str], fields: Tuple[int, ...], index_of: Callable[[List[str], int], int]
) -> List[Reading]:
    """Read lines by the places of temperature, power, used, total, utilisation (from 1)."""
    found: List[Reading] = []
    for number, line in enumerate(lines):
        words = line.split()
        try:
            temperature, power, used, total, utilisation = (words[place - 1] for place in fields)
            reading = Reading(
                index_of(words, number),
                _number(temperature, "C"),
                _number(power, "W"),
                _number(used, "MiB"),
                _number(total, "MiB"),
                _number(utilisation, "%"),
            )
        except (IndexError, ValueError):
            continue
        if 0 < reading.total_mib >= reading.used_mib:
            found.append(reading)
    return found


def parse_xpu_smi_m(text: str) -> List[Reading]:
    """Newer drivers, `xpu-smi -m`: fields 5 C, 9 W, 18 used, 19 total (MiB), 20 %; field 2 is the card's index.

    >>> parse_xpu_smi_m("0 3 x x 46 x x x 114 x x x x x x x x 23730 32768 100")[0]
    Reading(index=3, temperature_c=46.0, power_w=114.0, used_mib=23730.0, total_mib=32768.0, utilisation=100.0)
    >>> parse_xpu_smi_m("0 3 x x 46 x x x 114 x x x x x x x x lots 32768 100")
    []
    """
    return _readings(text.splitlines(), (5, 9, 18, 19, 20), lambda words, _: int(words[1]))


def parse_xpu_smi(text: str) -> List[Reading]:
    """Older drivers, `xpu_smi`: cards in order, a line each, with "xpu" and 29 fields or more.

    Fields 29 C, 27 W, 22 used, 24 total (MiB), 14 %. A line of that shape that cannot be read keeps its place.

    >>> line = "xpu " + "x " * 12 + "100% " + "x " * 7 + "23730MiB x 32768MiB x x 114W x 46C"
    >>> parse_xpu_smi(line)[0].used_mib
    23730.0
    >>> parse_xpu_smi("no such device")
    []
    """
    lines = [line for line in text.splitlines() if "xpu" in line and len(line.split()) >= 29]
    return _readings(lines, (29, 27, 22, 24, 14), lambda _, number: number)


def output_of(*command: str) -> str:
    """What a program prints, stripped; nothing if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
        return done.stdout.decode("utf-8", errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def xpu_memory() -> Dict[int, Tuple[float, float]]:
    """(used, total) bytes of each card, from whichever of the vendor's tools is installed; empty without one."""
    for tool, parse in ((("xpu-smi", "-m"), parse_xpu_smi_m), (("xpu_smi",), parse_xpu_smi)):
        if shutil.which(tool[0]):
            readings = parse(output_of(*tool))
            if readings:
                return {entry.index: (entry.used_mib * _MIB, entry.total_mib * _MIB) for entry in readings}
    return {}


def parse_names(text: str) -> Dict[int, str]:
    """Names of the cards out of `xpu-smi -m`, by field 2, in double quotes.

    >>> parse_names('0 3 x x 46 x x x 114 x x x x x x x x 23730 32768 100 x "KUNLUN R300"')
    {3: 'KUNLUN R300'}
    >>> parse_names("no device")
    {}
    """
    found = {}
    for line in text.splitlines():
        words, name = line.split(), re.search(r'"([^"]+)"', line)
        if name and len(words) > 1 and words[1].isdigit():
            found[int(words[1])] = name.group(1)
    return found


def xpu_names() -> Dict[int, str]:
    """Name of each card; empty where the vendor's tool is missing, or does not say."""
    return parse_names(output_of("xpu-smi", "-m"))


def card_of(index: int, visible: str) -> Optional[int]:
    """Number of a visible device among the cards of the machine; None if the variable names cards otherwise (UUIDs)."""
    cards = os.environ.get(visible, "").split(",")
    card = cards[index].strip() if index < len(cards) else ""
    if not card:
        return index
    return int(card) if card.isdigit() else None


def parse_driver(text: str) -> Optional[str]:
    """Driver's version out of `xpu-smi -q`.

    >>> parse_driver("Driver Version                  : 4.0.25")
    '4.0.25'
    >>> parse_driver("no driver")
    """
    found = re.search(r"^\s*driver version\s*:\s*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return found.group(1) if found else None


def xpu_driver() -> Optional[str]:
    """Version of the XPU driver, from whichever of the vendor's tools is installed."""
    for tool in ("xpu-smi", "xpu_smi"):
        if shutil.which(tool):
            version = parse_driver(output_of(tool, "-q"))
            if version:
                return version
    return None


def nvml_memory() -> Dict[int, Tuple[float, float]]:
    """(used, total) bytes of each NVIDIA card by NVML; empty without the package nvidia-ml-py or a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        found = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
            found[index] = (float(memory.used), float(memory.total))
        return found
    except Exception:  # no package, no driver, or a driver of another age: then no reading
        return {}


def nvml_processes(index: int, visible: str) -> Optional[int]:
    """Processes that compute on a visible NVIDIA card; None without the package nvidia-ml-py or a driver."""
    card = card_of(index, visible)
    try:
        import pynvml

        pynvml.nvmlInit()
        return len(pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(card)))
    except Exception:  # as above
        return None


class MemoryWatch:
    """Asks a monitor again and again in a thread, and keeps the largest value of each card."""

    def __init__(self, read: Callable[[], Dict[int, Tuple[float, float]]], every_s: float = _SAMPLE_EVERY_S) -> None:
        """Describe the watch.

        Args:
            read: (used, total) bytes of each card of the machine, by its index there.
            every_s: seconds between readings.
        """
        self._read, self._every = read, every_s
        self._used: Dict[int, float] = {}
        self._last: Dict[int, float] = {}
        self._total: Dict[int, float] = {}
        self._cards: Dict[int, int] = {}
        self._thread: Optional[threading.Thread] = None

    def start(self, index: int, visible: str) -> None:
        """Watch a device of this process.

        Args:
            index: its index among the visible ones.
            visible: the variable that says which cards of the machine are visible, such as CUDA_VISIBLE_DEVICES.
        """
        card = card_of(index, visible)
        if card is None:
            return  # the monitor's numbers say nothing of these cards
        self._cards[index] = card
        self._sample()
        if self._used and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._every):
            self._sample()

    def _sample(self) -> None:
        for card, (used, total) in self._read().items():
            self._used[card] = max(used, self._used.get(card, 0.0))
            self._last[card] = used
            self._total[card] = total

    def peak(self, index: int) -> Optional[float]:
        """Largest reading of a device so far, bytes; None without a reading. Never asks the monitor itself."""
        return self._used.get(self._cards.get(index, -1))

    def last(self, index: int) -> Optional[float]:
        """Newest reading of a device, bytes; None without a reading. Never asks the monitor itself."""
        return self._last.get(self._cards.get(index, -1))

    def total(self, index: int) -> Optional[float]:
        """Memory of a device, bytes; None without a reading."""
        if not self._total:
            self._sample()
        return self._total.get(self._cards.get(index, index))
