"""The figure of what the cards did while a run went on: power, utilisation, temperature, the phases behind them."""

from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure as Canvas

from lit_glm.hardware.watch import readings_of
from lit_glm.report.runs import Run
from lit_glm.report.words import Words

_SHOWN = ("power_w", "utilisation", "temperature_c", "mem_gib")
_MOST_CARDS = 16
Span = Tuple[float, float]


def phases(run: Run) -> List[Tuple[str, List[Span]]]:
    """When a run that was never interrupted was in which phase, in seconds since the entry of `train`."""
    init, e2e = run.number("init_time"), run.number("e2e_time")
    if init is None or e2e is None or run.result.get("interruptions"):
        return []
    spans: List[Span] = []
    steps = [_seconds(row.get("step_s")) for row in run.table("steps.csv")]
    done = np.concatenate([[0.0], np.cumsum(steps)])
    earlier = 0.0
    for row in run.table("evals.csv"):
        step, seconds = _seconds(row.get("step")), _seconds(row.get("seconds"))
        if not 0 < step < len(done):
            continue
        begin = init + float(done[int(step)]) + earlier
        spans.append((begin, begin + seconds))
        earlier += seconds
    return [("part_init", [(0.0, init)]), ("part_training", [(init, e2e)]), ("part_eval", spans)]


def _seconds(text: Any) -> float:
    try:
        return float(text or 0.0)
    except ValueError:
        return 0.0


def draw_devices(shown: Sequence[Tuple[str, Run]], words: Words) -> Optional[Canvas]:
    """Of the first run that has readings: a line a card and kind of reading; None where no monitor has spoken."""
    for name, run in shown:
        cards = readings_of(run.path / "devices.csv")
        kinds = [kind for kind in _SHOWN if any(one[kind] is not None for card in cards.values() for one in card)]
        if "power_w" not in kinds and "temperature_c" not in kinds:
            continue  # of processors without counters there is nothing that other figures do not show
        canvas = Canvas(figsize=(9.0, 1.2 + 1.5 * len(kinds)))
        axes = canvas.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        for place, kind in zip(axes, kinds):
            for (node, card), readings in list(cards.items())[:_MOST_CARDS]:
                points = [(one["time_s"], one[kind]) for one in readings if one[kind] is not None]
                if points:
                    place.plot(*zip(*points), lw=1, label=f" {node}:{card}")
            for number, (part, spans) in enumerate(phases(run)):
                for index, (begin, end) in enumerate(spans):
                    label = words(part) if place is axes[0] and index == 0 else None
                    place.axvspan(begin, end, color=f"C{7 + number}", alpha=0.12, lw=0, label=label)
            place.set_ylabel(words(kind))
            place.set_ylim(bottom=0)
        axes[0].set_title(name, fontsize=9)
        axes[-1].set_xlabel(words("seconds"))
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower left", ncols=6, fontsize=8)
        return canvas
    return None
