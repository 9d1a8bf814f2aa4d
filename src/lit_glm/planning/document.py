"""Output of `plan`: plan.json, plan.md and plan.svg with its scaling plot, and the table on the screen."""

import io
import json
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure as Canvas

from lit_glm.atomic_files import make_folder, write_text
from lit_glm.config.schema import ScoringConfig, TopologyConfig
from lit_glm.errors import InputError
from lit_glm.metrics.registry import METRICS
from lit_glm.planning.prediction import Interval, MeasuredRun, Prediction, is_same_device_type, predict, rank_speed
from lit_glm.planning.workload import Workload, load_examples
from lit_glm.reporting.plots import STYLE, use_plain_numbers
from lit_glm.runs.result import markdown_table

_MARKS = {"measured": "o", "published": "D"}


@dataclass
class ScalingCurve:
    """Predicted curve of one device type under one scoring."""

    name: str
    rows: List[Prediction]
    """One prediction per number of devices."""
    points: List[Tuple[str, int, float]]
    """("measured" or "published", number of devices, p_core)."""


def draw_scaling(curves: List[ScalingCurve], samples: str) -> Optional[str]:
    """Draw the curves as SVG; None without curves."""
    if not curves:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        canvas = Canvas(figsize=(9.0, 4.0))
        left, right = canvas.subplots(1, 2)
        for number, curve in enumerate(curves):
            colour = f"C{number}"
            devices = [row.config.topology.world_size for row in curve.rows]
            _draw_band(left, devices, [row.p_core for row in curve.rows], colour, curve.name)
            hours = [row.total_s * (row.config.topology.world_size / 3600.0) for row in curve.rows]
            _draw_band(right, devices, hours, colour)
            for kind, mark in _MARKS.items():
                points = [(count, rate) for name, count, rate in curve.points if name == kind]
                if points:
                    label = f"{curve.name}, {kind} run"
                    left.plot(*zip(*points), mark, color=colour, markeredgecolor="black", label=label)
        for axes, axis_label in ((left, METRICS["p_core"].axis_label()), (right, f"device-hours to {samples}")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            use_plain_numbers(axes.xaxis)
            use_plain_numbers(axes.yaxis)
            axes.set_xlabel("devices")
            axes.set_ylabel(axis_label)
        canvas.suptitle("Predicted range by number of devices")
        canvas.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw_band(axes: Any, devices: List[int], spans: List[Interval], colour: str, label: Optional[str] = None) -> None:
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    axes.fill_between(devices, lows, highs, color=colour, alpha=0.25, label=label)
    axes.plot(devices, [(low * high) ** 0.5 for low, high in zip(lows, highs)], color=colour, linewidth=1)


_FITS = {True: "yes", False: "no", None: "unknown"}
_HEAD = (
    f"config|precision|scoring|bs|memory GiB|fits|step s|{METRICS['p_core'].axis_label()}|samples|total time|energy MJ|"
    "evidence"
).split("|")


def format_duration(span: Interval) -> str:
    """Format a duration in hours, minutes or seconds."""
    for unit, seconds in (("h", 3600.0), ("min", 60.0)):
        if span.high >= 2 * seconds:
            return f"{(span * (1 / seconds)).text()} {unit}"
    return f"{span.text()} s"


def prediction_table(predictions: List[Prediction], basis: Dict[str, int]) -> str:
    """Format the predictions as a table, with their evidence by number."""
    rows = [list(_HEAD)]
    for prediction in predictions:
        config = prediction.config
        memory = prediction.memory_gib.text()
        device_memory_gib = config.hardware.memory_gib
        rows.append(
            [
                f"{config.hardware.name} {config.topology.name}",
                config.precision.name + (" (TF32)" if config.precision.tf32 else ""),
                config.scoring.name,
                str(config.bs),
                memory if device_memory_gib is None else f"{memory} of {device_memory_gib:g}",
                _FITS[prediction.fits],
                prediction.step_s.text(),
                prediction.p_core.text(),
                f"{prediction.samples:,}",
                format_duration(prediction.total_s),
                "" if prediction.energy_j is None else (prediction.energy_j * 1e-6).text(),
                f"[{basis[prediction.evidence]}]",
            ]
        )
    return markdown_table(rows)


def write_plan(
    folder: Path,
    predictions: List[Prediction],
    measured: List[MeasuredRun],
    published: List[Dict[str, Any]],
    samples: Tuple[int, str],
    left_out: List[str],
) -> str:
    """Write the output files.

    Args:
        folder: the run folder.
        predictions: rows of the table.
        measured: measured runs, for the plot.
        published: rows of conf/published.yaml, for the plot.
        samples: number of samples of all rows, and its explanation.
        left_out: what could not be predicted, and why.

    Returns:
        Text for the console.

    Raises:
        InputError: if the folder has files of these names that `plan` has not written.
    """
    _check_not_foreign(folder)
    basis: Dict[str, int] = {}
    for prediction in predictions:
        basis.setdefault(prediction.evidence, len(basis) + 1)
    lines = ["PREDICTED, not measured: every number is an interval.", "", prediction_table(predictions, basis), ""]
    lines += [f"time and energy are for {samples[1]}"]
    lines += [f"[{number}] {text}" for text, number in basis.items()]
    lines += [f"left out: {text}" for text in left_out]
    make_folder(folder)
    write_text(folder / "plan.json", json.dumps([prediction.row() for prediction in predictions], indent=1))
    config_of_type = {row.config.hardware.name: row.config for row in reversed(predictions)}
    curves = [
        curve
        for config in reversed(config_of_type.values())
        for scoring in ("published", "shared_context")
        for curve in [_scaling_curve(config, scoring, measured, published, samples[0])]
        if curve
    ]
    picture = draw_scaling(curves, f"{samples[0]:,} samples")
    if picture is not None:
        write_text(folder / "plan.svg", picture)
    shown = "\n".join(lines)
    write_text(folder / "plan.md", shown + ("\n\n![throughput and cost](plan.svg)\n" if picture else "\n"))
    return f"{shown}\nlit_glm: {folder}/plan.md, plan.json" + (", plan.svg" if picture else "")


def _check_not_foreign(folder: Path) -> None:
    existing = [name for name in ("plan.json", "plan.md", "plan.svg") if (folder / name).exists()]
    try:
        earlier: Any = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        is_ours = isinstance(earlier, list) and all(row["predicted"] for row in earlier)
    except (OSError, ValueError, TypeError, KeyError):
        is_ours = False
    if existing and not is_ours:
        raise InputError(f"{folder}: contains {', '.join(existing)}, not written by plan; give another hydra.run.dir=")


def even_topology(devices: int, most_per_node: int) -> TopologyConfig:
    """Return the topology with the fewest nodes that holds exactly this number of devices, as many on each node."""
    nodes = next(number for number in count(-(-devices // most_per_node)) if devices % number == 0)
    return TopologyConfig(nodes, devices // nodes)


def _scaling_curve(
    config: Any, scoring: str, measured: List[MeasuredRun], published: List[Dict[str, Any]], samples: int
) -> Optional[ScalingCurve]:
    """Predict a configuration's device type over the number of devices, under one scoring."""
    name = config.hardware.name
    per_node = max(8, config.topology.devices_per_node)
    rows: List[Prediction] = []
    if config.scoring.name != scoring:
        other = ScoringConfig(scoring, scoring == "published", scoring != "published")
        model = replace(config.model, activation_checkpointing=other.activation_checkpointing)
        config = replace(config, scoring=other, model=model)
    data = replace(config.data, balance_ranks=config.scoring.balance_ranks)
    config = replace(config, run=replace(config.run, max_samples=samples, max_steps=None), data=data)
    for num_devices in config.plan.device_counts:
        row_config = replace(config, topology=even_topology(num_devices, per_node))
        train, held, evidence = load_examples(row_config)
        work = Workload(row_config, train, held)
        if work.has_enough_examples:
            rows.append(predict(row_config, rank_speed(row_config, measured, published), work, evidence, samples))
    if not rows:
        return None
    points = []
    for run in measured:
        p_core = METRICS["p_core"].value(run.result)
        same_model = run.config.model.name == config.model.name and run.config.scoring.name == scoring
        if p_core and run.is_usable and is_same_device_type(run.config, config) and same_model:
            points.append(("measured", run.config.topology.world_size, p_core))
    if scoring == "published":
        for line in published:
            nodes, devices = str(line["topology"]).split("x")
            if line["hardware"] == name and line.get("p_core") and line["precision"] == config.precision.name:
                points.append(("published", int(nodes) * int(devices), float(line["p_core"])))
    return ScalingCurve(f"{name}, scoring={scoring}", rows, points)
