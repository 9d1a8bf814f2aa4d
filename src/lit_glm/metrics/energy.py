"""Energy of a run: device power integrated over each node's training time, summed over all devices."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.device_monitor import load_readings, monitor_for, readings_file

Reading = Dict[str, Optional[float]]
Span = Sequence[float]
_MAX_MISSING = 5
"""Consecutive readings that may be missing: power is interpolated linearly; with more the energy is unknown."""
_LATE = 0.5
"""Fraction of an interval by which a reading may be late without counting as missing."""


def in_kilojoules(joules: float) -> str:
    """Format an energy in kJ, below 1 kJ with three digits."""
    return f"{joules / 1000:.1f}" if joules >= 1000 else f"{joules / 1000:.3g}"


def integrate_power(readings: List[Reading], spans: List[Span], interval_s: float) -> Optional[Tuple[float, float]]:
    """Integrate the power of one device over time spans, by the trapezoidal rule.

    Before the first and after the last reading, the power of that reading is assumed, for at most the longest gap.

    Args:
        readings: readings of the device, ordered by time.
        spans: start and end times, in the time base of the readings.
        interval_s: seconds between readings.

    Returns:
        Joules, and seconds without readings; None if more than five consecutive readings are missing or have no power.
    """
    known = [(reading["time_s"] or 0.0, reading["power_w"]) for reading in readings if reading["power_w"] is not None]
    if not known and spans:
        return None
    joules, bridged_s, (times, powers) = 0.0, 0.0, np.array(known, float).reshape(-1, 2).T
    for number, (begin, end) in enumerate(spans):
        # Between the parts of a resumed run nothing was read: that is no gap in the readings of a part.
        since = begin - (1.0 + _LATE) * interval_s if number > 0 else -np.inf
        until = end + (1.0 + _LATE) * interval_s if number + 1 < len(spans) else np.inf
        part_times, part_powers = (column[(since <= times) & (times <= until)] for column in (times, powers))
        if not len(part_times):
            return None
        first, last = np.searchsorted(part_times, begin, side="right"), np.searchsorted(part_times, end)
        nearby = part_times[max(0, first - 1) : last + 1]
        moments = np.concatenate([[min(begin, nearby[0])], nearby, [max(end, nearby[-1])]])
        gaps = np.diff(moments)
        if gaps.max() > (_MAX_MISSING + 1 + _LATE) * interval_s:
            return None
        sample_times = np.concatenate([[begin], part_times[first:last], [end]])
        power = np.interp(sample_times, part_times, part_powers)
        joules += float((np.diff(sample_times) * (power[1:] + power[:-1])).sum() / 2)
        within = np.diff(np.clip(moments, begin, end))
        bridged_s += float(within[gaps > (1.0 + _LATE) * interval_s].sum())
    return joules, bridged_s


def energy_metrics(
    run_dir: Path, config: TrainConfig, spans_by_node: List[List[Span]], samples: Optional[float], sliced: bool = False
) -> Dict[str, Any]:
    """Compute energy, power and temperature of a run.

    Args:
        run_dir: run folder.
        config: run configuration; there must be readings of all its devices, and of no others.
        spans_by_node: start and end of each node's training in the time base of its devices.csv; several if resumed.
        samples: number of samples trained in that time.
        sliced: whether the devices are MIG slices; readings of whole devices are then ignored.

    Returns:
        Entries of result.json; None where the power of any device is unknown.
    """
    monitor, topology = monitor_for(config.hardware), config.topology
    has_spans = len(spans_by_node) == topology.num_nodes and all(spans_by_node)
    is_known, energies, during = has_spans, [], []
    seconds = 0.0
    for node in range(topology.num_nodes):
        readings_of_device = load_readings(readings_file(run_dir, node))
        if sliced:
            readings_of_device = {key: readings for key, readings in readings_of_device.items() if not key[1].isdigit()}
        is_shared = monitor is None or monitor.visible_devices_variable is None
        expected = len(readings_of_device) if is_shared else topology.devices_per_node
        is_known = is_known and bool(readings_of_device) and len(readings_of_device) == expected
        spans = spans_by_node[node] if node < len(spans_by_node) else []
        seconds = max(seconds, sum(end - begin for begin, end in spans))
        for readings in readings_of_device.values():
            energies.append(integrate_power(readings, spans, config.hardware.monitor_interval_s))
            during += [
                reading
                for reading in readings
                if any(begin <= (reading["time_s"] or 0.0) <= end for begin, end in spans)
            ]
    known = [energy for energy in energies if energy is not None]
    is_known = is_known and len(known) == len(energies)
    total = sum(joules for joules, _ in known) if is_known else None
    bridged = sum(bridged_s for _, bridged_s in known) / len(known) if is_known and known else None
    powers = [value for value in (reading["power_w"] for reading in during) if value is not None]
    temperatures = [value for value in (reading["temperature_c"] for reading in during) if value is not None]
    return {
        "energy_j": total,
        "samples_per_joule": samples / total if total and samples else None,
        "energy_bridged_share": bridged / seconds if bridged is not None and seconds else None,
        "power_mean_w": total / seconds if total is not None and seconds else None,
        "power_max_w": max(powers, default=None),
        "temperature_mean_c": sum(temperatures) / len(temperatures) if temperatures else None,
        "temperature_max_c": max(temperatures, default=None),
    }
