"""The figures of the page, drawn by matplotlib as SVG: text stays text, so that it scales, prints and can be found."""

import io
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from lit_glm.report.devices import draw_devices
from lit_glm.report.rows import marked
from lit_glm.report.runs import Row, Run, as_number
from lit_glm.report.words import Words

_MOST_LINES = 8
_MOST_POINTS = 600
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass
class Figure:
    """One figure of the page."""

    key: str
    caption: str
    svg: Markup


Series = Tuple[str, Run]


def draw(rows: List[Row], words: Words) -> Tuple[List[Figure], List[str]]:
    """All figures that the runs have data for, at most eight rows in each; and what is not in them, a line each."""
    shown: List[Series] = [(_legend(row, words), row.typical) for row in rows][:_MOST_LINES]
    drawn: List[Figure] = []
    kinds: List[Tuple[str, Callable[[List[Series], Words], Optional[Canvas]]]] = [
        ("fig_loss", _loss),
        ("fig_acc", _accuracy),
        ("fig_throughput", _throughput),
        ("fig_time", _time),
        ("fig_memory", _memory),
        ("fig_devices", draw_devices),
        ("fig_grid", lambda _, words: _grid(rows, words)),
    ]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        for key, make in kinds:
            canvas = make(shown, words)
            if canvas is not None:
                drawn.append(Figure(key, words(key), _svg(canvas, words(key), key)))
    there = {figure.key for figure in drawn}
    missing = [words(key) for key, _ in kinds if key not in there]
    notes = [words("fig_more", _MOST_LINES, len(rows) - _MOST_LINES)] if len(rows) > _MOST_LINES else []
    notes += [words("fig_missing", "; ".join(missing))] if missing else []
    return drawn, notes


def _legend(row: Row, words: Words) -> str:
    return f"{marked(row, words)} {row['precision']} {row['fix_hp']} {row['scoring']}"


def _svg(canvas: Canvas, title: str, key: str) -> Markup:
    import warnings

    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks: the browser has them
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name in set(re.findall(r'\bid="([^"]+)"', text)):  # ids of several figures in one page must not meet
        text = text.replace(f'id="{name}"', f'id="{key}-{name}"')
        text = text.replace(f'"#{name}"', f'"#{key}-{name}"').replace(f"url(#{name})", f"url(#{key}-{name})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def _canvas(columns: int = 1, height: float = 3.2) -> Tuple[Canvas, Any]:
    canvas = Canvas(figsize=(9.0, height))
    return canvas, canvas.subplots(1, columns, squeeze=False)[0]


def _columns(table: List[Dict[str, str]], *names: str) -> List[Any]:
    """Columns as arrays, lines without a number in the first two of them left out."""
    rows = [[_float(row.get(name)) for name in names] for row in table]
    kept = np.array([row for row in rows if np.isfinite(row[:2]).all()]).reshape(-1, len(names))
    return list(kept.T)


def _float(text: Optional[str]) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _thin(*arrays: Any) -> List[Any]:
    """At most so many points, evenly taken."""
    step = max(1, len(arrays[0]) // _MOST_POINTS)
    return [array[::step] for array in arrays]


def _finish(canvas: Canvas, lines: int) -> Canvas:
    if lines:
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        canvas.legend(unique.values(), unique.keys(), loc="outside lower left", fontsize=8)
    return canvas


def _shown(name: str) -> str:
    return " " + name  # a legend leaves out names that begin with an underscore


def _loss(shown: Sequence[Series], words: Words) -> Optional[Canvas]:
    canvas, (left, right) = _canvas(2)
    lines = 0
    for name, run in shown:
        steps, loss, rate = _columns(run.table("steps.csv"), "step", "loss", "lr")
        if len(steps):
            steps, loss, rate = _thin(steps, loss, rate)
            left.plot(steps, loss, lw=1, label=_shown(name))
            right.plot(steps, rate, lw=1.2)
            lines += 1
    left.set(xlabel=words("step"), ylabel=words("loss"))
    right.set(xlabel=words("step"), ylabel=words("lr"))
    return _finish(canvas, lines) if lines else None


def _accuracy(shown: Sequence[Series], words: Words) -> Optional[Canvas]:
    canvas, (left, right) = _canvas(2)
    lines = 0
    for name, run in shown:
        step, accuracy, samples = _columns(run.table("evals.csv"), "step", "acc", "samples")
        if not len(step):
            continue
        left.plot(samples, 100 * accuracy, marker="o", ms=3, lw=1.2, label=_shown(name))
        done, seconds = _columns(run.table("steps.csv"), "step", "step_s")
        if len(done):
            clock = np.concatenate([[0.0], np.cumsum(seconds)]) / 60
            right.plot(clock[np.searchsorted(done, step, side="right")], 100 * accuracy, marker="o", ms=3, lw=1.2)
        lines += 1
    left.set(xlabel=words("samples"), ylabel=f"{words('accuracy')} (%)")
    right.set(xlabel=words("minutes"), ylabel=f"{words('accuracy')} (%)")
    return _finish(canvas, lines) if lines else None


def warm_up(steps: int) -> int:
    """How many of the first steps are left out of percentiles: a twentieth, at least 1 and at most 50."""
    return min(50, max(1, steps // 20)) if steps > 1 else 0


def percentiles(seconds: Any, samples: float) -> Tuple[float, float, float]:
    """Samples a second of the step that takes longer than 50, 90, 99 % of the steps after warm-up."""
    settled = seconds[warm_up(len(seconds)) :]
    p50, p90, p99 = (samples / float(np.percentile(settled, share)) for share in (50, 90, 99))
    return p50, p90, p99


def _throughput(shown: Sequence[Series], words: Words) -> Optional[Canvas]:
    canvas, (axes,) = _canvas(1)
    lines = 0
    for name, run in shown:
        steps, seconds, samples = _columns(run.table("steps.csv"), "step", "step_s", "samples")
        if not len(steps) or not (seconds > 0).all():
            continue
        batch = float(samples[0] / steps[0])
        p50, p90, p99 = percentiles(seconds, batch)
        first = warm_up(len(steps))
        rate = batch / seconds
        said = f"{name}: p50 {p50:.4g}, p90 {p90:.4g}, p99 {p99:.4g}"
        (line,) = axes.plot(*_thin(steps[first:], rate[first:]), lw=0.8, label=_shown(said))
        axes.plot(steps[:first], rate[:first], ".", ms=3, color="0.6")
        axes.axhline(p50, lw=0.8, ls="--", color=line.get_color(), alpha=0.7)
        lines += 1
    axes.set(xlabel=words("step"), ylabel=words("rate"))
    axes.set_ylim(bottom=0)
    return _finish(canvas, lines) if lines else None


def _time(shown: Sequence[Series], words: Words) -> Optional[Canvas]:
    parts = ("part_init", "part_data", "part_compute", "part_eval", "part_other")
    bars: List[Tuple[str, List[float]]] = []
    for name, run in shown:
        keys = ("e2e_time", "init_time", "no_eval_time", "pure_compute_time")
        e2e, init, no_eval, compute = (run.number(key) for key in keys)
        if e2e is None or init is None or no_eval is None or compute is None:
            continue
        evaluation = sum(_float(row.get("seconds")) for row in run.table("evals.csv") if row.get("step") != "0")
        evaluation = evaluation if np.isfinite(evaluation) else 0.0
        other = max(0.0, e2e - init - no_eval - evaluation)
        waiting = sum(_float(row.get("data_s")) for row in run.table("steps.csv"))
        waiting = min(waiting, no_eval - compute) if np.isfinite(waiting) else 0.0
        other += max(0.0, no_eval - compute - waiting)
        bars.append((name, [init, waiting, compute, evaluation, other]))
    if not bars:
        return None
    canvas, (axes,) = _canvas(1, 1.6 + 0.35 * len(bars))
    starts = np.zeros(len(bars))
    for number, part in enumerate(parts):
        widths = np.array([bar[1][number] for bar in bars])
        axes.barh(range(len(bars)), widths, left=starts, label=words(part), height=0.6)
        starts += widths
    axes.set_yticks(range(len(bars)), [_shown(name) for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel(words("seconds"))
    canvas.legend(loc="outside lower left", ncols=5, fontsize=8)
    return canvas


def _memory(shown: Sequence[Series], words: Words) -> Optional[Canvas]:
    canvas, (axes,) = _canvas(1)
    lines = 0
    for name, run in shown:
        seconds, used = _columns(run.table("memory.csv"), "seconds", "gib")
        if len(seconds):
            axes.plot(*_thin(seconds / 60, used), lw=1.2, label=_shown(name))
            lines += 1
    axes.set(xlabel=words("minutes"), ylabel="GiB")
    axes.set_ylim(bottom=0)
    return _finish(canvas, lines) if lines else None


def _grid(rows: List[Row], words: Words) -> Optional[Canvas]:
    """The largest set of rows that differ in bs and lr alone."""
    groups: Dict[Tuple[str, ...], List[Row]] = {}
    for row in rows:
        if not row.runs[0].complete or row.number > 1:
            continue  # of rows that differ in something else, the first
        key = tuple(str(row[name]) for name in ("hardware", "topology", "precision", "scoring", "simulated"))
        if as_number(row["bs"]) is not None and as_number(row["lr"]) is not None:
            groups.setdefault(key, []).append(row)
    if not groups:
        return None
    chosen, group = max(groups.items(), key=lambda item: len(item[1]))
    sizes, rates = sorted({row["bs"] for row in group}), sorted({row["lr"] for row in group})
    if len(sizes) * len(rates) < 2:
        return None
    canvas, axes = _canvas(2, 1.6 + 0.5 * len(sizes))
    for place, (figure, scale, form) in zip(axes, (("p_core", 1.0, "{:.4g}"), ("acc", 100.0, "{:.2f}%"))):
        values = np.full((len(sizes), len(rates)), np.nan)
        for row in group:
            found = row.median(figure)
            if found is not None:
                values[sizes.index(row["bs"]), rates.index(row["lr"])] = scale * found
        place.imshow(values, cmap="Blues", aspect="auto", alpha=0.7)
        for (y, x), value in np.ndenumerate(values):
            place.text(x, y, form.format(value) if np.isfinite(value) else "–", ha="center", va="center")
        place.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        place.set_yticks(range(len(sizes)), [f"{size:g}" for size in sizes])
        place.grid(False)
        place.set(xlabel="lr", ylabel="bs", title=figure)
    canvas.suptitle(" ".join(chosen[:4]), fontsize=9)
    return canvas
