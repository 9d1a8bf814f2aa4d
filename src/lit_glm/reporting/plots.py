"""Plots of the HTML page, drawn by matplotlib as SVG; text stays text, so that it scales and can be searched."""

import io
import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from lit_glm.hardware.device_monitor import load_readings
from lit_glm.metrics.registry import METRICS, as_number
from lit_glm.metrics.timing import PERCENTILES, drop_warmup, num_timing_warmup_steps
from lit_glm.reporting.definitions import Translations
from lit_glm.reporting.row_format import row_label
from lit_glm.reporting.run_reader import ReportRow, ReportRun

_PLOTTED_COLUMNS = ("power_w", "utilisation", "temperature_c", "mem_gib")
_MAX_DEVICES = 16
Span = Tuple[float, float]


def run_phases(run: ReportRun) -> List[Tuple[str, List[Span]]]:
    """Return the spans of each phase in seconds since the entry of `train`; empty for an interrupted run."""
    init, e2e = run.number("init_time"), run.number("e2e_time")
    if init is None or e2e is None or run.result.get("interruptions"):
        return []
    step, _, _, ends, seconds = _evaluations(run)
    spans = [(end - taken, end) for at, end, taken in zip(step, ends, seconds) if at > 0 and np.isfinite(end)]
    return [("part_init", [(0.0, init)]), ("part_training", [(init, e2e)]), ("part_eval", spans)]


def _evaluations(run: ReportRun) -> Tuple[Any, Any, Any, Any, Any]:
    """Return step, samples and accuracy of the evaluations, when each ended, and the seconds that it took.

    An end is in seconds since the entry of `train`, and nan if no step was recorded.
    """
    step, accuracy, samples, seconds = _numeric_columns(run.table("evals.csv"), "step", "acc", "samples", "seconds")
    done, step_s = _numeric_columns(run.table("steps.csv"), "step", "step_s")
    clock = np.concatenate([[0.0 if len(done) else np.nan], np.cumsum(step_s)])
    ends = clock[np.searchsorted(done, step, side="right")] + np.cumsum(np.where(step > 0, seconds, 0.0))
    return step, samples, accuracy, (run.number("init_time") or 0.0) + ends, seconds


def _plot_devices(shown: Sequence[Tuple[str, ReportRun]], words: Translations) -> "Panels":
    """Plot the readings of the first run that has any, one line per device and kind; None without readings."""
    for name, run in shown:
        readings_of_device = load_readings(run.path / "devices.csv")
        kinds = [
            kind
            for kind in _PLOTTED_COLUMNS
            if any(reading[kind] is not None for device in readings_of_device.values() for reading in device)
        ]
        if "power_w" not in kinds and "temperature_c" not in kinds:
            continue  # CPUs without power counters: other plots show the rest
        canvas = Canvas(figsize=(_WIDTH, 1.4 + 1.1 * len(kinds)))
        axes = canvas.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        for place, kind in zip(axes, kinds):
            for (node, device), readings in list(readings_of_device.items())[:_MAX_DEVICES]:
                points = [(reading["time_s"], reading[kind]) for reading in readings if reading[kind] is not None]
                if points:
                    place.plot(*zip(*points), lw=1, label=f" {node}:{device}")
            for number, (part, spans) in enumerate(run_phases(run)):
                for index, (begin, end) in enumerate(spans):
                    label = words(part) if place is axes[0] and index == 0 else None
                    place.axvspan(begin, end, color=f"C{7 + number}", alpha=0.3, lw=0, label=label)
            place.set_ylabel(words(kind))
            _start_at_zero(place)
        axes[0].set_title(name, fontsize=9)
        axes[-1].set_xlabel(words("seconds"))
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower left", ncols=4)
        return [canvas]
    return None


_WIDTH = 5.0
"""Width of a panel in inches: its text is readable on a phone, and two panels fit side by side on a screen."""
_MAX_TICKS = 5
_PALE = LinearSegmentedColormap.from_list("pale", ["#f7fbff", "#9ecae1"])
"""Colours of cells whose text has enough contrast, also on a dark page, which inverts them."""
_MAX_LINES = 8
_MAX_POINTS = 600
_SMOOTHED = 40
"""Points of a smoothed line: a loss is averaged over, and a throughput summarised in, this many parts of a run."""
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # keep dollar signs in names
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def use_plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers; matplotlib's default labels are formulas, which `STYLE` disables."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


@dataclass
class Plot:
    """One plot of the page."""

    key: str
    caption: str
    svgs: List[Markup]
    """Panels of one height, side by side on a wide screen and stacked on a narrow one."""
    legend: List[Tuple[str, str]]
    """(colour, text) of the lines, one legend for all panels."""


Series = Tuple[str, ReportRun]
Panels = Optional[List[Canvas]]


def draw_plots(rows: List[ReportRow], words: Translations) -> Tuple[List[Plot], List[str]]:
    """Draw all plots that the runs have data for, with at most eight rows each, and list what is missing."""
    names, grid = legend_labels(rows, words), _grid_rows(rows)
    shown: List[Series] = [(name, row.typical) for name, row in zip(names, rows)][:_MAX_LINES]
    drawn: List[Plot] = []
    missing: List[str] = []
    kinds: List[Tuple[str, Callable[[List[Series], Translations], Panels]]] = [
        ("fig_loss", _plot_loss),
        ("fig_acc", _plot_accuracy),
        ("fig_throughput", _plot_throughput),
        ("fig_time", _plot_time),
        ("fig_devices", _plot_devices),
        ("fig_memory", _plot_memory),
        ("fig_grid", lambda _, words: _plot_grid(grid, words)),
    ]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        for key, make in kinds:
            if key == "fig_memory" and drawn and drawn[-1].key == "fig_devices":
                continue  # the readings of the devices contain their memory
            if key == "fig_grid" and not grid:
                continue
            panels, caption = make(shown, words), words(key)
            if panels is None:
                missing.append(caption)
                continue
            if key == "fig_grid":
                caption = words.with_note(caption, row_label(grid[0], words))
            if any(row["simulated"] for row in (grid if key == "fig_grid" else rows[:_MAX_LINES])):
                caption = words.with_note(caption, words("simulated"))
            svgs = [_render_svg(canvas, caption, f"{key}{number}") for number, canvas in enumerate(panels)]
            drawn.append(Plot(key, caption, svgs, _legend(panels[0])))
    notes = [words("fig_more", _MAX_LINES, len(rows) - _MAX_LINES)] if len(rows) > _MAX_LINES else []
    notes += [words("fig_missing", "; ".join(missing))] if missing else []
    return drawn, notes


def legend_labels(rows: List[ReportRow], words: Translations) -> List[str]:
    """Return the names of rows in a legend, reduced to what differs; a single row keeps its label."""
    parts = [
        [row_label(row, words), str(row["precision"]), *str(row["fix_hp"]).split(","), str(row["scoring"])]
        for row in rows
    ]
    differing = [column for column in zip_longest(*parts, fillvalue="") if len(set(column)) > 1]
    labels = []
    for number, row in enumerate(rows):
        words_of_row = [column[number] for column in differing] + ([f"#{row.number}"] if row.number else [])
        label = " ".join(filter(None, words_of_row)) or row_label(row, words)
        labels.append(words.with_note(label, words("simulated")) if row["simulated"] else label)
    return labels


def _render_svg(canvas: Canvas, title: str, key: str) -> Markup:
    import warnings

    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks; browsers have them
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name in set(re.findall(r'\bid="([^"]+)"', text)):  # ids must be unique within the page
        text = text.replace(f'id="{name}"', f'id="{key}-{name}"')
        text = text.replace(f'"#{name}"', f'"#{key}-{name}"').replace(f"url(#{name})", f"url(#{key}-{name})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def _make_panels(columns: int = 1, height: float = 3.2) -> Tuple[List[Canvas], List[Any]]:
    """Create the panels of a plot and their axes."""
    panels = [Canvas(figsize=(_WIDTH, height)) for _ in range(columns)]
    return panels, [panel.subplots() for panel in panels]


def _start_at_zero(axes: Any) -> None:
    """Let the y axis start at zero, with some space above the highest value."""
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.06 * highest if np.isfinite(highest) and highest > 0 else 1.0)


def _scale_time(seconds: Any, shown: Sequence[Series], axes: Any, words: Translations) -> Any:
    """Return times in the unit of an axis, minutes if any run takes more than three, and label the axis."""
    in_minutes = any((run.number("e2e_time") or 0.0) > 180 for _, run in shown)
    axes.set_xlabel(words("minutes" if in_minutes else "seconds_since_start"))
    axes.xaxis.set_major_locator(MaxNLocator(_MAX_TICKS))
    return seconds / 60 if in_minutes else seconds


def _numeric_columns(table: List[Dict[str, str]], *names: str) -> List[Any]:
    """Return columns as arrays, without rows that lack a number in the first two columns."""
    rows = [[_parse_float(row.get(name)) for name in names] for row in table]
    kept = np.array([row for row in rows if np.isfinite(row[:2]).all()]).reshape(-1, len(names))
    return list(kept.T)


def _parse_float(text: Optional[str]) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _downsample(*arrays: Any) -> List[Any]:
    """Reduce arrays to about `_MAX_POINTS` evenly spaced points."""
    step = max(1, len(arrays[0]) // _MAX_POINTS)
    return [array[::step] for array in arrays]


def _legend(panel: Canvas) -> List[Tuple[str, str]]:
    """Return (colour, text) of the labelled lines and bars; empty where the panel has a legend of its own.

    Labels begin with a space: matplotlib leaves out those that begin with an underscore.
    """
    if panel.legends or not panel.axes:
        return []
    found: Dict[str, str] = {}
    handles: Any = panel.axes[0].get_legend_handles_labels()
    for handle, label in zip(*handles):
        colour = handle.get_color() if hasattr(handle, "get_color") else handle.patches[0].get_facecolor()
        found.setdefault(label.strip(), to_hex(colour))
    return [(colour, label) for label, colour in found.items()]


def _moving_average(values: Any, width: int) -> Any:
    """Return the mean of each value and its neighbours within `width`, of fewer at the ends."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _plot_loss(shown: Sequence[Series], words: Translations) -> Panels:
    tables = [(name, _numeric_columns(run.table("steps.csv"), "step", "loss", "lr")) for name, run in shown]
    tables = [(name, columns) for name, columns in tables if len(columns[0])]
    panels, axes = _make_panels(2 if _spread_widely([rate for _, (_, _, rate) in tables]) else 1)
    for name, (steps, loss, rate) in tables:
        smooth = _moving_average(loss, max(1, len(loss) // _SMOOTHED))
        (line,) = axes[0].plot(*_downsample(steps, smooth), lw=1.4, label=f" {name}")
        axes[0].plot(*_downsample(steps, loss), lw=0.8, alpha=0.25, color=line.get_color())
        if len(axes) > 1:
            axes[1].plot(*_downsample(steps, rate), lw=1.2)
    axes[0].set(xlabel=words("step"), ylabel=words("loss"))
    if len(axes) > 1:
        axes[1].set(xlabel=words("step"), ylabel=words("lr"))
    return panels if tables else None


def _spread_widely(rates: List[Any]) -> bool:
    """Return whether learning rates differ by more than 2 % of the highest; skipped steps delay them a little."""
    common = min(map(len, rates), default=0)
    known = [np.nan_to_num(rate[:common]) for rate in rates]
    highest = max((float(rate.max()) for rate in known if common), default=0.0)
    return any(float(np.median(np.abs(rate - known[0]))) > 0.02 * highest for rate in known[1:] if common)


def _plot_accuracy(shown: Sequence[Series], words: Translations) -> Panels:
    panels, (left, right) = _make_panels(2)
    for name, run in shown:
        step, samples, accuracy, ends, _ = _evaluations(run)
        if len(step):
            left.plot(samples, 100 * accuracy, marker="o", ms=3, lw=1.2, label=f" {name}")
            if np.isfinite(ends).any():
                right.plot(_scale_time(ends, shown, right, words), 100 * accuracy, marker="o", ms=3, lw=1.2)
    has_times = bool(right.lines)
    if not left.lines:
        return None
    targets = {as_number(run.settings.get("run.target_accuracy")) for _, run in shown} - {None}
    for target in sorted(value for value in targets if value is not None):
        for axes in (left, right):
            axes.axhline(100 * target, lw=0.8, ls=":", color="0.4")
        left.annotate(words("target", f"{100 * target:g}"), (0, 100 * target), fontsize=8, va="bottom", color="0.4")
    left.set(xlabel=words("samples"), ylabel=words("accuracy"))
    left.xaxis.set_major_locator(MaxNLocator(_MAX_TICKS))
    right.set_ylabel(words("accuracy"))
    return panels if has_times else panels[:1]


def throughput_percentiles(seconds: Any, samples: float) -> Tuple[float, float, float]:
    """Return samples per second at the 50th, 90th and 99th percentile of the step time after warm-up."""
    p50, p90, p99 = (samples / float(np.percentile(drop_warmup(seconds), share)) for share in PERCENTILES)
    return p50, p90, p99


def _plot_throughput(shown: Sequence[Series], words: Translations) -> Panels:
    panels, (axes,) = _make_panels(1)
    for name, run in shown:
        steps, seconds, samples = _numeric_columns(run.table("steps.csv"), "step", "step_s", "samples")
        if not len(steps) or not (seconds > 0).all():
            continue
        batch = float(samples[0] / steps[0])
        p50, p90, p99 = throughput_percentiles(seconds, batch)
        first = num_timing_warmup_steps(len(steps))
        rate = batch / seconds
        text = words.with_note(name, words("slowness", f"{p50:.4g}", f"{p90:.4g}", f"{p99:.4g}"))
        parts = [part for part in np.array_split(np.arange(first, len(steps)), _SMOOTHED) if len(part)]
        low, middle, high = (np.array([np.percentile(rate[part], share) for part in parts]) for share in (10, 50, 90))
        centres = np.array([steps[part].mean() for part in parts])
        (line,) = axes.plot(centres, middle, lw=1.4, label=f" {text}")
        axes.fill_between(centres, low, high, color=line.get_color(), alpha=0.18, lw=0)
        axes.plot(steps[:first], rate[:first], ".", ms=3, color="0.6")
    axes.set(xlabel=words("step"), ylabel=words("rate"))
    _start_at_zero(axes)
    return panels if axes.lines else None


def _plot_time(shown: Sequence[Series], words: Translations) -> Panels:
    parts = ("part_init", "part_data", "part_compute", "part_eval", "part_other")
    bars: List[Tuple[str, List[float]]] = []
    for name, run in shown:
        keys = ("e2e_time", "init_time", "no_eval_time", "pure_compute_time")
        e2e, init, no_eval, compute = (run.number(key) for key in keys)
        if not e2e or init is None or no_eval is None or compute is None:
            continue
        evaluation = sum(_parse_float(row.get("seconds")) for row in run.table("evals.csv") if row.get("step") != "0")
        evaluation = evaluation if np.isfinite(evaluation) else 0.0
        other = max(0.0, e2e - init - no_eval - evaluation)
        waiting = sum(_parse_float(row.get("data_s")) for row in run.table("steps.csv"))
        waiting = min(waiting, no_eval - compute) if np.isfinite(waiting) else 0.0
        other += max(0.0, no_eval - compute - waiting)
        shares = [100.0 * part / e2e for part in (init, waiting, compute, evaluation, other)]
        bars.append((words.with_note(name, f"{e2e:.3g} s"), shares))
    if not bars:
        return None
    panels, (axes,) = _make_panels(1, 0.8 + 0.45 * len(bars))
    starts = np.zeros(len(bars))
    for number, part in enumerate(parts):
        widths = np.array([bar[1][number] for bar in bars])
        axes.barh(range(len(bars)), widths, left=starts, label=words(part), height=0.4)
        starts += widths
    for number, (name, _) in enumerate(bars):
        axes.text(0, number - 0.26, name)  # above its bar: names are long
    axes.set_yticks([])
    axes.set_ylim(len(bars) - 0.6, -0.8)
    axes.set(xlabel=words("share_of_time"), xlim=(0, 100))
    return panels


def _plot_memory(shown: Sequence[Series], words: Translations) -> Panels:
    panels, (axes,) = _make_panels(1)
    for name, run in shown:
        seconds, used = _numeric_columns(run.table("memory.csv"), "seconds", "gib")
        if len(seconds):
            axes.plot(*_downsample(_scale_time(seconds, shown, axes, words), used), lw=1.2, label=f" {name}")
    axes.set_ylabel(words("mem_gib"))
    _start_at_zero(axes)
    return panels if axes.lines else None


def plot_trials(rates: Dict[int, List[float]], too_large: Iterable[int], title: str) -> str:
    """Plot the throughput of the trials of `tune` by batch size, dotted lines where one did not fit; return the SVG."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        canvas = Canvas(figsize=(6.0, 3.4))
        axes = canvas.subplots()
        points = [(bs, rate) for bs, samples in rates.items() for rate in samples]
        axes.plot(*zip(*points), "o", alpha=0.6, label="trials")
        axes.plot(list(rates), [np.median(samples) for samples in rates.values()], linewidth=1, label="median")
        for bs in too_large:
            axes.axvline(bs, color="tab:red", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        use_plain_numbers(axes.xaxis)
        axes.set(xlabel="bs (dotted: did not fit)", ylabel=METRICS["p_core"].axis_label(), title=title)
        axes.legend()
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _grid_rows(rows: List[ReportRow]) -> List[ReportRow]:
    """Return the largest set of rows that differ only in bs and lr; [] if none has two."""
    groups: Dict[Tuple[str, ...], List[ReportRow]] = {}
    for row in rows:
        if not row.runs[0].complete or row.number > 1:
            continue  # of rows that differ in other settings, the first
        key = tuple(str(row[name]) for name in ("hardware", "topology", "precision", "scoring", "simulated"))
        if as_number(row["bs"]) is not None and as_number(row["lr"]) is not None:
            groups.setdefault(key, []).append(row)
    largest = max(groups.values(), key=len, default=[])
    return largest if len({(row["bs"], row["lr"]) for row in largest}) > 1 else []


def _plot_grid(group: List[ReportRow], words: Translations) -> Panels:
    """Plot p_core and accuracy of rows that differ only in bs and lr."""
    sizes, rates = sorted({row["bs"] for row in group}), sorted({row["lr"] for row in group})
    panels, axes = _make_panels(2, 1.2 + 0.5 * len(sizes))
    titles = (f"p_core: {words('rate')}", words("accuracy"))
    for place, metric, title in zip(axes, (METRICS["p_core"], METRICS["acc"]), titles):
        values = np.full((len(sizes), len(rates)), np.nan)
        for row in group:
            median = row.median(metric.name)
            if median is not None:
                values[sizes.index(row["bs"]), rates.index(row["lr"])] = median
        place.imshow(values, cmap=_PALE, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            place.text(x, y, metric.form(value) if np.isfinite(value) else "–", ha="center", va="center")
        place.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        place.set_yticks(range(len(sizes)), [f"{size:g}" for size in sizes])
        place.grid(False)
        place.set(xlabel="lr", ylabel="bs")
        place.set_title(title, fontsize=9)
    return panels
