"""Published rows next to the measured ones, with ratios only for comparable rows."""

import functools
from typing import Any, Dict, List, Optional, Tuple

from omegaconf import OmegaConf

from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.metrics.registry import PUBLISHED_COLUMNS
from lit_glm.reporting.definitions import ReportTable, Translations, published_settings
from lit_glm.reporting.row_format import Note, format_cell, label_with_annotations, note_texts, unique_row_label
from lit_glm.reporting.run_reader import ReportRow, ReportRun

_RATIOS = ("e2e_time", "p_whole", "p_train", "p_core")
_WORKLOAD = (
    *(f"model.{key}" for key in ("name", "num_layers", "hidden_size", "num_attention_heads", "vocab_size")),
    *("data.name", "data.max_seq_length"),
)
"""Keys of the workload, in which a run must agree with the published case."""
_DOUBT = " †"
"""Mark after a precision that the case files of the row contradict."""


@functools.lru_cache(maxsize=None)
def load_published_rows() -> List[Dict[str, Any]]:
    """Load the rows of conf/published.yaml in the format of result.json."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "published.yaml"))
    return [{"scoring": content["scoring"], "converged": True, "status": "success", **row} for row in content["rows"]]


def load_published_run_length() -> Tuple[int, str]:
    """Return the number of samples of a published run, and the name of that run."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "published.yaml"))
    return int(content["run_length"]["samples"]), str(content["run_length"]["of"])


def published_tables(rows: List[ReportRow], words: Translations) -> Tuple[ReportTable, ReportTable]:
    """Build the table of published rows, those of the report's hardware first, and the table of ratios."""
    measured_hardware = {str(row["hardware"]) for row in rows}
    published = sorted(load_published_rows(), key=lambda line: line["hardware"] not in measured_hardware)
    wrapped = [
        ReportRow([ReportRun(CONF_DIR, line, settings={"hardware.product_name": line["hardware"].upper()})])
        for line in published
    ]
    lines = [
        [
            _published_name(line, words),
            *(
                format_cell(row, column) + (_DOUBT if column == "precision" and line.get("fp16_flag") else "")
                for column in PUBLISHED_COLUMNS[1:]
            ),
            line["source"],
        ]
        for line, row in zip(published, wrapped)
    ]
    notes_below = [words("published_note"), f"{_DOUBT.strip()} {words('published_fp16_flag')}"]
    table = ReportTable([words("config"), *PUBLISHED_COLUMNS[1:], words("source")], lines, notes_below)
    ratios: List[List[str]] = []
    notes: List[Note] = []
    published_target = published_settings().get("run.target_accuracy")
    for row in rows:
        matches, note = matching_rows(row, words)
        name, target = unique_row_label(row, words), row.runs[0].settings.get("run.target_accuracy")
        if matches and not row.converged:
            note = Note("no_ratio_e2e", name)
        elif matches and target != published_target:
            note = Note("no_ratio_target", name, (str(target), str(published_target)))
        measured = {key: row.median(key) for key in _RATIOS if note is None or key != "e2e_time"}
        values = [[_format_ratio(measured.get(key), line.get(key)) for key in _RATIOS] for line in matches]
        known = [(line, texts) for line, texts in zip(matches, values) if any(texts)]
        label, fix_hp = label_with_annotations(row, words), str(row["fix_hp"])
        ratios += [[label, fix_hp, str(line["fix_hp"]), *texts] for line, texts in known]
        notes += [note] if note is not None else []
        notes += [Note("no_ratio_figures", name)] if matches and not known else []
    head = [words("config"), "fix_hp", words.with_note("fix_hp", words("source")), *_RATIOS]
    return table, ReportTable(head, ratios, note_texts(notes, words))


def _published_name(line: Dict[str, Any], words: Translations) -> str:
    if words.language == "zh" and line.get("zh"):
        return str(line["zh"])
    return words.config(line["hardware"].upper().replace("_", "-"), line["topology"])


def _format_ratio(measured: Any, published: Any) -> str:
    return f"{measured / published:.2f}x" if measured and published else ""


def matching_rows(row: ReportRow, words: Translations) -> "Tuple[List[Dict[str, Any]], Optional[Note]]":
    """Return the published rows that are comparable to a row, or the reason why there are none."""
    name, left = unique_row_label(row, words), load_published_rows()
    for key, applies in (
        ("no_ratio_simulated", row["simulated"]),
        ("no_ratio_profiled", row["profiled"]),
        ("no_ratio_on_cpu", row["computed_on_cpu"]),
        ("no_ratio_incomplete", not row.runs[0].complete),
    ):
        if applies:
            return [], Note(key, name)
    for key, columns in (
        ("no_ratio_hardware", ("hardware",)),
        ("no_ratio_topology", ("topology",)),
        ("no_ratio_precision", ("precision", "tf32")),
    ):
        # Results of earlier versions lack `tf32`.
        left = [line for line in left if all(line[column] == (row[column] or False) for column in columns)]
        if not left:
            return [], Note(key, name)
    if row["scoring"] != left[0]["scoring"]:
        return [], Note("no_ratio_scoring", name, (str(row["scoring"]),))
    settings, case = row.runs[0].settings, published_settings()
    other = [f"{key}={settings.get(key, '?')}" for key in _WORKLOAD if settings.get(key) != case.get(key)]
    if other:
        return [], Note("no_ratio_workload", name, (", ".join(other),))
    return left, None
