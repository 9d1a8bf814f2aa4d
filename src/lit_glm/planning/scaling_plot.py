"""Throughput and cost over the number of cards, for both scorings, measured and published points on it."""

import io
from dataclasses import dataclass
from typing import List, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure as Canvas

from lit_glm.metrics.registry import METRICS
from lit_glm.planning.prediction import Prediction
from lit_glm.reporting.plots import STYLE

_MARKS = {"measured": "o", "published": "D"}


@dataclass
class ScalingCurve:
    """One scoring."""

    scoring: str
    rows: List[Prediction]
    """One a number of cards."""
    points: List[Tuple[str, int, float]]
    """measured or published, cards, p_core."""


def draw_scaling(curves: List[ScalingCurve], chip: str) -> Optional[str]:
    """SVG; None without curves."""
    if not curves:
        return None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        canvas = Canvas(figsize=(9.0, 3.6))
        left, right = canvas.subplots(1, 2)
        for curve, colour in zip(curves, ("tab:blue", "tab:orange")):
            cards = [row.config.topology.world_size for row in curve.rows]
            rates = [row.p_core for row in curve.rows]
            left.fill_between(
                cards, [r.low for r in rates], [r.high for r in rates], color=colour, alpha=0.25, label=curve.scoring
            )
            left.plot(cards, [(r.low * r.high) ** 0.5 for r in rates], color=colour, linewidth=1)
            hours = [row.total_s * (row.config.topology.world_size / 3600.0) for row in curve.rows]
            right.fill_between(
                cards, [h.low for h in hours], [h.high for h in hours], color=colour, alpha=0.25, label=curve.scoring
            )
            right.plot(cards, [(h.low * h.high) ** 0.5 for h in hours], color=colour, linewidth=1)
            for kind in _MARKS:
                own = [(count, rate) for what, count, rate in curve.points if what == kind]
                if own:
                    label = f"{curve.scoring}, {kind}"
                    left.plot(*zip(*own), _MARKS[kind], color=colour, markeredgecolor="black", label=label)
        for axes, what in ((left, METRICS["p_core"].axis_label()), (right, "cost, card-hours to the sample limit")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("cards")
            axes.set_ylabel(what)
            axes.legend()
        canvas.suptitle(f"{chip}: predicted (bands), by number of cards")
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
