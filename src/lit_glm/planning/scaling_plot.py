"""Throughput and cost over the number of devices, of each chip and scoring, measured and published points on it."""

import io
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure as Canvas

from lit_glm.metrics.registry import METRICS
from lit_glm.planning.interval import Interval
from lit_glm.planning.prediction import Prediction
from lit_glm.reporting.plots import STYLE, use_plain_numbers

_MARKS = {"measured": "o", "published": "D"}


@dataclass
class ScalingCurve:
    """One chip under one scoring."""

    name: str
    rows: List[Prediction]
    """One a number of devices."""
    points: List[Tuple[str, int, float]]
    """measured or published, devices, p_core."""


def draw_scaling(curves: List[ScalingCurve], samples: str) -> Optional[str]:
    """SVG; None without curves.

    Args:
        curves: what is drawn, a colour each.
        samples: the number of samples that the cost is of, as text.
    """
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
                own = [(count, rate) for what, count, rate in curve.points if what == kind]
                if own:
                    label = f"{curve.name}, {kind} run"
                    left.plot(*zip(*own), mark, color=colour, markeredgecolor="black", label=label)
        for axes, what in ((left, METRICS["p_core"].axis_label()), (right, f"device-hours to {samples}")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            use_plain_numbers(axes.xaxis)
            use_plain_numbers(axes.yaxis)
            axes.set_xlabel("devices")
            axes.set_ylabel(what)
        canvas.suptitle("Predicted, from low to high, by number of devices")
        canvas.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw_band(axes: Any, devices: List[int], spans: List[Interval], colour: str, label: Optional[str] = None) -> None:
    lows, highs = [span.low for span in spans], [span.high for span in spans]
    axes.fill_between(devices, lows, highs, color=colour, alpha=0.25, label=label)
    axes.plot(devices, [(low * high) ** 0.5 for low, high in zip(lows, highs)], color=colour, linewidth=1)
