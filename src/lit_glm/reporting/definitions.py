"""Texts in both languages, and the table of metric definitions: what columns mean, what is not as published."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List

from omegaconf import OmegaConf

from lit_glm.metrics.registry import TABLE_METRICS
from lit_glm.reporting.run_reader import ReportRow, ReportRun


@dataclass
class ReportTable:
    """Table of text cells with notes and a heading."""

    columns: List[str]
    rows: List[List[str]]
    notes: List[str] = field(default_factory=list)
    heading: str = ""


_WORDS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("i18n.yaml")))
_STATES = ("success", "finished", "running", "killed", "interrupted", "failed")
_NODES = {1: "单机", 2: "两机", 3: "三机", 4: "四机"}


class Translations:
    """Texts in one language, called as `words("missing_cell", row, name)`."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, key: str, *values: Any) -> str:
        """Return a text with its placeholders filled in; braces within values are kept."""
        text = _WORDS[key][self.language]
        return text.format(*values) if values else text

    def state(self, status: str) -> str:
        """Translate a run status; unknown ones are returned unchanged."""
        return self(status) if status in _STATES else status

    def with_note(self, text: str, note: str) -> str:
        """Return a text with a note in brackets, which are full-width in Chinese."""
        return f"{text} ({note})" if self.language == "en" else f"{text}（{note}）"

    def join(self, texts: Iterable[str]) -> str:
        """Return texts as one list."""
        return (", " if self.language == "en" else "，").join(texts)

    def config(self, product_name: str, topology: str) -> str:
        """Return the name of a row: product name and topology; in Chinese as published, `NAME单机8卡（1x8）`."""
        nodes, _, devices = topology.partition("x")
        if self.language == "en" or not (nodes.isdecimal() and devices.isdecimal()):
            return f"{product_name} {topology}"
        machines = _NODES.get(int(nodes), f"{nodes}机")
        return f"{product_name}{machines}{'单' if devices == '1' else devices}卡（{topology}）"


def distinct_texts(values: List[Any]) -> List[str]:
    """Return the values as strings, without duplicates and unknown ones."""
    return list(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def metric_definitions(name: str, rows: List[ReportRow], words: Translations) -> ReportTable:
    """Build the table of column definitions and changed settings for the rows of one device type."""
    runs = [run for row in rows for run in row.runs]

    def setting_values(key: str, otherwise: str) -> str:
        return ", ".join(distinct_texts([run.settings.get(key) for run in runs])) or otherwise

    device_names = distinct_texts([run.environment.get("device_name") for run in runs])
    precisions = ", ".join(distinct_texts([row["precision"] for row in rows]))
    data = {"record": "ReCoRD", "synthetic": "synthetic"}
    sets = ", ".join(data.get(text, text) for text in distinct_texts([run.settings.get("data.name") for run in runs]))
    lines = [
        ("task", words("task_value"), ""),
        ("model", words.with_note("GLM", setting_values("model.name", str(runs[0].result.get("model")))), ""),
        ("data", sets, ""),
        ("precision", words("see", precisions), words("precision_remark")),
        ("fix_hp", words("see", "fix_hp"), words("fix_hp_remark")),
        ("short_name", ", ".join(device_names) or name, ""),
    ]
    language = words.language
    # As published: memory comes first, unlike in the table of rows.
    ordered = sorted(TABLE_METRICS, key=lambda metric: metric.column != "mem")
    metric_rows = [[column.label(language), words("see", column.column), column.remark(language)] for column in ordered]
    changes = [words("changes"), "; ".join(_changed_settings(runs)) or words("none"), words("changes_remark")]
    columns = [words("name"), words("value"), words("remark")]
    shown = [[words(key), value, remark] for key, value, remark in lines]
    return ReportTable(columns, [*shown, *metric_rows, changes], heading=name)


@functools.lru_cache(maxsize=None)
def published_settings() -> Dict[str, Any]:
    """Return the flat configuration of the published case, experiment=flagperf; {} if its files cannot be read."""
    from lit_glm.config.hydra_main import load_config
    from lit_glm.config.schema import TrainConfig, iter_keys
    from lit_glm.errors import InputError

    try:
        flagperf = load_config("train", ["experiment=flagperf"], TrainConfig)
    except InputError:
        return {}
    return {key: value for key, value, _ in iter_keys(flagperf)}


def _changed_settings(runs: List[ReportRun]) -> List[str]:
    """List settings that differ from the published case, with their values."""
    published = published_settings()
    judged = (
        "model.", "optimizer.", "scoring.name", "data.name", "data.max_seq_length", "precision.tf32",
        "run.target_accuracy", "run.max_steps", "seed",
    )  # fmt: skip
    pair = ("model.activation_checkpointing", "model.gelu", "optimizer.lr", "model.init_checkpoint")
    changed: Dict[str, List[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            other_shape = run.settings.get("model.name") != published.get("model.name")
            if key.startswith("model.") and key != "model.name" and other_shape:
                continue  # another model has another shape
            if key.startswith(judged) and key not in pair and key in published and published[key] != value:
                changed.setdefault(key, []).append(str(value))
    return [f"{key}={', '.join(dict.fromkeys(values))}" for key, values in sorted(changed.items())]
