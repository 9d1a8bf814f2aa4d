"""Which batch size to try next; tune.json after every trial; at the end a table, a plot and the fix_hp file."""

import io
import json
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure as Canvas

from lit_glm.atomic_files import write_json, write_text
from lit_glm.config.key_aliases import migrate_names
from lit_glm.config.schema import TrainConfig
from lit_glm.config.tuned_values import MODEL_KEYS, TUNE_FILE
from lit_glm.metrics.memory_estimate import estimate_memory
from lit_glm.metrics.registry import METRICS
from lit_glm.planning.prediction import saves_attention_probs
from lit_glm.planning.workload import Workload
from lit_glm.reporting.plots import STYLE, use_plain_numbers
from lit_glm.runs.job_spec import config_hash
from lit_glm.runs.result import config_fields, markdown_table

FITS, MEMORY, LIMIT, TIME = "fits", "out of memory", "not tried", "no time"


@dataclass
class Trial:
    """One trial of a batch size."""

    bs: int
    status: str
    p_core: Optional[float] = None
    """Samples per second, for examples of average length."""
    mfu: Optional[float] = None
    memory_gib: Optional[float] = None
    samples_per_joule: Optional[float] = None
    message: str = ""
    """Why it does not fit."""


def trials_by_bs(tries: List[Trial]) -> Dict[int, List[Trial]]:
    """Group the trials that fit by batch size."""
    found: Dict[int, List[Trial]] = {}
    for one in tries:
        if one.status == FITS and one.p_core is not None:
            found.setdefault(one.bs, []).append(one)
    return dict(sorted(found.items()))


def median_p_core(tries: List[Trial]) -> float:
    """Return the median p_core of trials."""
    return statistics.median(one.p_core or 0.0 for one in tries)


def largest_bs(tries: List[Trial]) -> Optional[int]:
    """Return the largest batch size that fits; None if none does."""
    return max(trials_by_bs(tries), default=None)


def fastest_bs(tries: List[Trial]) -> Optional[int]:
    """Return the batch size with the highest median p_core, the smaller one of equals; None without trials."""
    known = trials_by_bs(tries)
    return max(known, key=lambda bs: (median_p_core(known[bs]), -bs), default=None)


def next_bs(tries: List[Trial], most: int, repeats: int) -> Optional[int]:
    """Return the batch size to try next.

    Args:
        tries: the trials so far.
        most: the largest batch size that the data allows.
        repeats: maximum number of trials per batch size.

    Returns:
        The batch size; None if the search is complete.
    """
    known = trials_by_bs(tries)
    too_large = [one.bs for one in tries if one.status != FITS]
    low, high = max(known, default=0), min(too_large, default=most + 1)
    if low == 0:
        return 1 if not too_large else None
    if high > most and low < most:
        return min(2 * low, most)  # double until one does not fit
    if high - low > max(1, low // 16):
        return (low + high) // 2
    return _refine(known) or _repeat(known, repeats)


def _refine(known: Dict[int, List[Trial]]) -> Optional[int]:
    """Return a batch size next to the fastest if a neighbour is more than a quarter away; else None."""
    order = list(known)
    best = max(known, key=lambda bs: median_p_core(known[bs]))
    place = order.index(best)
    for low, high in ((place, place + 1), (place - 1, place)):
        if low >= 0 and high < len(order) and order[high] - order[low] > max(1, order[low] // 4):
            return (order[low] + order[high]) // 2
    return None


def _repeat(known: Dict[int, List[Trial]], repeats: int) -> Optional[int]:
    """Return which of the two fastest to repeat: each at least twice, then while their ranges overlap; else None."""
    best, *others = sorted(known, key=lambda bs: -median_p_core(known[bs]))[:2]
    for bs in [best, *others]:
        if len(known[bs]) < min(2, repeats):
            return bs
    if not others:
        return None
    slower = others[0]
    apart = min(one.p_core or 0.0 for one in known[best]) > max(one.p_core or 0.0 for one in known[slower])
    fewer = min((best, slower), key=lambda bs: len(known[bs]))
    return None if apart or len(known[fewer]) >= repeats else fewer


class SearchState:
    """Trials of a search, stored in its folder."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """Open a folder, and load its earlier trials of the same search.

        Args:
            folder: folder of the search.
            config: configuration of the runs; its bs is ignored.
        """
        self.folder, self._config = folder, config
        self.trials: List[Trial] = []
        self.seconds = 0.0
        """Seconds spent so far, including interrupted parts."""
        before = read_state(folder)
        if before is not None:
            names = {field.name for field in fields(Trial)}
            known = [Trial(**{key: value for key, value in one.items() if key in names}) for one in before["trials"]]
            self.trials = [one for one in known if one.status != TIME]  # this part may have more time
            self.seconds = float(before["seconds"])

    def write(self, complete: bool) -> None:
        """Write tune.json."""
        content = {
            **search_fields(self._config),
            "config_hash": search_hash(self._config),
            "complete": complete,
            "seconds": self.seconds,
            "largest_bs": largest_bs(self.trials),
            "fastest_bs": fastest_bs(self.trials),
            "trials": [asdict(one) for one in self.trials],
        }
        write_json(self.folder / TUNE_FILE, content)

    def conclude(self, work: Workload, software: str, complete: bool) -> str:
        """Write tune.md, tune.svg and the fix_hp file; return the summary."""
        best, most = fastest_bs(self.trials), largest_bs(self.trials)
        text = trial_table(self.trials, self._config, work, complete)
        said = [text, ""]
        if not complete:
            said.append("INCOMPLETE: the search ended early; larger or faster values may exist")
        if best is None:
            said.append("no batch size fits: use a smaller model, activation checkpointing, or more memory")
        else:
            pair = f"{self._config.hardware.name}_{self._config.topology.name}.yaml"
            write_text(self.folder / pair, fix_hp_text(self.trials, self._config, text, software, complete))
            names = ("that fits", "fastest") if complete else ("tried", "fastest so far")
            said += [
                f"largest bs {names[0]}: {most}; {names[1]}: {best}",
                f"bs=auto uses the fastest bs found below outputs/tune/; to keep it, copy {self.folder / pair}",
                "to the folder fix_hp/ of your own configuration (--config-dir)",
            ]
            write_text(self.folder / "tune.svg", _plot_trials(self.trials, self._config))
        shown = "\n".join(said)
        write_text(self.folder / "tune.md", shown + ("\n\n![samples per second by bs](tune.svg)\n" if best else "\n"))
        return shown


def search_fields(config: TrainConfig) -> Dict[str, Any]:
    """Return the configuration fields that describe a search."""
    known = config_fields(config)
    return {
        **{key: known[key] for key in ("hardware", "topology", "precision", "scoring", "model")},
        "tf32": config.precision.tf32,
        **{key: getattr(config.model, key) for key in MODEL_KEYS},
        "max_seq_length": config.data.max_seq_length,
    }


def search_hash(config: TrainConfig) -> str:
    """Return the hash of the configuration of a search, independent of bs and eval_bs."""
    plain = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)})
    return config_hash(replace(plain, bs=1, eval_bs=1))


def read_state(folder: Path) -> Optional[Dict[str, Any]]:
    """Read tune.json; None if it is missing or invalid."""
    try:
        content: Any = json.loads((folder / TUNE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return migrate_names(content, "tune.json") if isinstance(content, dict) else None


def trial_table(tries: List[Trial], config: TrainConfig, work: Workload, complete: bool) -> str:
    """Format one row per batch size as a Markdown table: fastest first, those that do not fit last."""
    known, best, most = trials_by_bs(tries), fastest_bs(tries), largest_bs(tries)
    rows = [
        [
            "bs",
            "p_core",
            "[lowest, highest]",
            "trials",
            "mfu",
            "memory GiB",
            "estimated GiB without base",
            "samples/J",
            "",
        ]
    ]
    for bs in sorted(known, key=lambda bs: -median_p_core(known[bs])):
        own = known[bs]
        rates = [one.p_core or 0.0 for one in own]
        guess = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config), bs).total / 2**30
        names = ("fastest", "largest that fits") if complete else ("fastest so far", "largest tried")
        marks = [name for name, is_so in zip(names, (bs == best, bs == most)) if is_so]
        spread = f"[{min(rates):.4g}, {max(rates):.4g}]"
        rows.append(
            [
                str(bs),
                f"{median_p_core(own):.4g}",
                spread if len(own) > 1 else "",
                str(len(own)),
                _format_number(own[-1].mfu, 3),
                _format_number(max((one.memory_gib or 0.0 for one in own), default=None) or None, 2),
                f"{guess:.2f}",
                _format_number(own[-1].samples_per_joule, 3),
                ", ".join(marks),
            ]
        )
    others = {one.bs: one for one in tries if one.bs not in known}
    rows += [[str(bs), "", "", "", "", "", "", "", one.status] for bs, one in sorted(others.items())]
    return markdown_table(rows)


def _format_number(value: Optional[float], digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}" if digits == 3 else f"{value:.{digits}f}"


def fix_hp_text(tries: List[Trial], config: TrainConfig, text: str, software: str, complete: bool) -> str:
    """Return the text of the fix_hp file of the pair, with the trials as comments."""
    best, most = fastest_bs(tries), largest_bs(tries)
    pair = f"{config.hardware.name}_{config.topology.name}"
    about = f"{config.precision.name}, scoring={config.scoring.name}, model={config.model.name}"
    about_bs = (
        f"The fastest bs; the largest that fits is {most}."
        if complete
        else f"INCOMPLETE search (complete: false): the fastest bs so far; the largest tried is {most}."
    )
    evidence = "\n".join(f"# {line}".rstrip() for line in text.splitlines())
    return (
        f"# @package _global_\n# Found by `python -m lit_glm.tune` for {pair}: {about}; {software}.\n"
        f"# {about_bs}\n{evidence}\n"
        f"fix_hp_source: {pair}\nbs: {best}\neval_bs: {best}\n"
    )


def _plot_trials(tries: List[Trial], config: TrainConfig) -> str:
    known = trials_by_bs(tries)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lit_glm"}):
        canvas = Canvas(figsize=(6.0, 3.4))
        axes = canvas.subplots()
        points: List[Tuple[int, float]] = [(bs, one.p_core or 0.0) for bs, own in known.items() for one in own]
        axes.plot(*zip(*points), "o", alpha=0.6, label="trials")
        axes.plot(list(known), [median_p_core(own) for own in known.values()], linewidth=1, label="median")
        for bs in sorted({one.bs for one in tries if one.status in (MEMORY, LIMIT)} - set(known)):
            axes.axvline(bs, color="tab:red", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        use_plain_numbers(axes.xaxis)
        axes.set_xlabel("bs (dotted: did not fit)")
        axes.set_ylabel(METRICS["p_core"].axis_label())
        axes.set_title(f"{config.hardware.name} {config.topology.name} {config.precision.name} {config.scoring.name}")
        axes.legend()
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
