"""Comparison of two runs: configuration, metrics, and losses per step."""

import math
from typing import List, Optional, Tuple

from lit_glm.metrics.registry import METRICS
from lit_glm.reporting.definitions import ReportTable
from lit_glm.reporting.formats import table_lines
from lit_glm.reporting.run_reader import ReportRun, config_differences

_MAX_SHOWN = 20
"""Approximate number of rows in the table of losses, evenly spaced."""


def compare_runs(one: ReportRun, other: ReportRun) -> Tuple[str, Optional[float]]:
    """Compare runs A and B; return the text, and the largest difference of the loss (None without common steps)."""
    settings = ReportTable(
        ["key", "A", "B"], [[key, _to_text(a), _to_text(b)] for key, a, b in config_differences(one, other)]
    )
    lines = [f"A: {one.path}", f"B: {other.path}", "", "## Configuration and environment", ""]
    lines += table_lines(settings) if settings.rows else ["No difference."]
    lines += ["", "## Metrics", "", *table_lines(_metrics_table(one, other))]
    steps = _common_losses(one, other)
    lines += ["", "## Loss, step by step", ""]
    if not steps:
        return "\n".join([*lines, "No common steps."]) + "\n", None
    worst = max(steps, key=lambda step: _loss_difference(*step[1:]))
    largest = _loss_difference(*worst[1:])
    first = next((step for step in steps if _loss_difference(*step[1:])), None)
    lines += [
        f"steps in common: {len(steps)}",
        f"largest difference: {largest:.3g} (step {worst[0]}: A {worst[1]:.6g}, B {worst[2]:.6g})",
        f"mean difference: {sum(_loss_difference(a, b) for _, a, b in steps) / len(steps):.3g}",
        "first step that differs: " + ("none" if first is None else str(first[0])),
    ]
    shown = steps[:: max(1, len(steps) // _MAX_SHOWN)]
    lines_of = [[str(step), f"{a:.6g}", f"{b:.6g}", f"{_loss_difference(a, b):.3g}"] for step, a, b in shown]
    lines += ["", *table_lines(ReportTable(["step", "loss A", "loss B", "difference"], lines_of))]
    return "\n".join(lines) + "\n", largest


def _loss_difference(a: float, b: float) -> float:
    """Return the absolute difference of two losses; infinity if only one is finite, 0 if none is."""
    if math.isfinite(a) and math.isfinite(b):
        return abs(b - a)
    return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf


def _to_text(value: object) -> str:
    return "" if value is None else str(value)


def _metrics_table(one: ReportRun, other: ReportRun) -> ReportTable:
    lines = []
    for key in (metric.name for metric in METRICS.values() if metric.is_compared):
        a, b = one.number(key), other.number(key)
        if a is None and b is None:
            continue
        ratio = f"{b / a:.3f}" if a and b is not None else ""
        lines.append([key, "" if a is None else f"{a:.6g}", "" if b is None else f"{b:.6g}", ratio])
    settings = ("status", "scoring", "simulated", "hardware", "topology", "precision")
    lines += [[key, _to_text(one.result.get(key)), _to_text(other.result.get(key)), ""] for key in settings]
    return ReportTable(["metric", "A", "B", "B / A"], lines)


def _common_losses(one: ReportRun, other: ReportRun) -> List[Tuple[int, float, float]]:
    """Return (step, loss of A, loss of B) of all common steps."""

    def losses(run: ReportRun) -> "dict[int, float]":
        loss_of_step = {}
        for row in run.table("steps.csv"):
            try:
                step, loss = int(row["step"]), float(row["loss"] or "nan")  # a skipped step may have none
            except (KeyError, ValueError):
                continue
            loss_of_step[step] = loss
        return loss_of_step

    left, right = losses(one), losses(other)
    return [(step, left[step], right[step]) for step in sorted({*left} & {*right})]
