"""What the cards took while a run trained: power integrated over the training time, all cards together."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.device_monitor import load_readings, monitor_for, readings_file

Reading = Dict[str, Optional[float]]
Span = Sequence[float]


def integrate_power(readings: List[Reading], spans: List[Span]) -> Optional[float]:
    """Power of one card integrated over some spans of time, by trapezoids; None where a reading has no power.

    Before its first and after its last reading a card is taken to have had the power that these say.
    """
    points: List[Tuple[float, float]] = []
    for reading in readings:
        if reading["power_w"] is None:
            return None
        points.append((float(reading["time_s"] or 0.0), reading["power_w"]))
    if not points:
        return None

    def power(at: float) -> float:
        after = next((number for number, (moment, _) in enumerate(points) if moment >= at), len(points))
        if after == 0 or after == len(points):
            return points[min(after, len(points) - 1)][1]
        (t0, p0), (t1, p1) = points[after - 1], points[after]
        return p0 if t1 == t0 else p0 + (p1 - p0) * (at - t0) / (t1 - t0)

    total = 0.0
    for begin, end in spans:
        inside = [point for point in points if begin < point[0] < end]
        path = [(begin, power(begin)), *inside, (end, power(end))]
        total += sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in zip(path, path[1:]))
    return total


def energy_metrics(run_dir: Path, config: TrainConfig, spans: List[Span], samples: Optional[float]) -> Dict[str, Any]:
    """Energy, power and temperature of a run.

    Args:
        run_dir: its folder.
        config: the run's: the readings of all its cards must be there, and of no others.
        spans: begin and end of training, in the time of devices.csv; more than one if it was resumed.
        samples: trained meanwhile.

    Returns:
        Entries of result.json; None where any card's power is unknown.
    """
    cards: Dict[Tuple[str, str], List[Reading]] = {}
    monitor, topology, complete = monitor_for(config.hardware), config.topology, bool(spans)
    for node in range(topology.num_nodes):
        found = load_readings(readings_file(run_dir, node))
        wanted = topology.devices_per_node if monitor is not None and monitor.visible_devices_variable else len(found)
        complete = complete and bool(found) and len(found) == wanted
        cards.update(found)
    of_each = [integrate_power(readings, spans) for readings in cards.values()]
    known = complete and all(one is not None for one in of_each)
    total = sum(one for one in of_each if one is not None) if known else None
    seconds = sum(end - begin for begin, end in spans)
    during = [
        reading
        for readings in cards.values()
        for reading in readings
        if any(begin <= (reading["time_s"] or 0.0) <= end for begin, end in spans)
    ]
    powers = [value for value in (reading["power_w"] for reading in during) if value is not None]
    warmth = [value for value in (reading["temperature_c"] for reading in during) if value is not None]
    return {
        "energy_j": total,
        "samples_per_joule": samples / total if total and samples else None,
        "power_mean_w": total / seconds if total is not None and seconds else None,
        "power_max_w": max(powers, default=None),
        "temperature_mean_c": sum(warmth) / len(warmth) if warmth else None,
        "temperature_max_c": max(warmth, default=None),
    }
