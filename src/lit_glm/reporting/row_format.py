"""Formatting of a row: name, annotations, cells in the published formats, reasons for empty cells."""

from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from lit_glm.metrics.registry import TABLE_COLUMNS, TABLE_METRICS, cell_text
from lit_glm.reporting.definitions import Translations
from lit_glm.reporting.run_reader import ReportRow
from lit_glm.runs.environment import latest_verification
from lit_glm.runs.result import contending_cpu_load, has_many_skipped_steps, has_shared_devices, text_list

_BY_COLUMN = {metric.column: metric for metric in TABLE_METRICS}


def row_label(row: ReportRow, words: Translations) -> str:
    """Return the name of a row, such as `CARD 1x8`, by the product name if it matches the hardware file's name."""
    product_name = str(row.runs[0].settings.get("hardware.product_name") or "")
    hardware = str(row["hardware"])
    short = product_name if product_name and product_name.lower().replace("-", "_") == hardware.lower() else hardware
    return words.config(short, str(row["topology"]))


def unique_row_label(row: ReportRow, words: Translations) -> str:
    """Return a unique name of a row: with its hyperparameters, and a number if these are equal too."""
    number = f" #{row.number}" if row.number else ""
    return f"{row_label(row, words)} {row['fix_hp']}{number}"


def label_with_annotations(row: ReportRow, words: Translations, more: Sequence[str] = ()) -> str:
    """Return the name of a row with its annotations."""
    annotations = [*row_annotations(row, words), *more]
    label = row_label(row, words)
    return words.with_note(label, words.join(annotations)) if annotations else label


def row_annotations(row: ReportRow, words: Translations) -> List[str]:
    """List what a reader must know before comparing the row."""
    runs, data = row.runs, row.runs[0].settings.get("data.name")
    has_real_lengths = runs[0].settings.get("data.synthetic.lengths") == "record"
    open_ended = sum(run.complete and not run.result.get("converged") for run in runs)
    resumed, repeated = (sum(int(run.number(key) or 0) for run in runs) for key in ("interruptions", "repeated_steps"))
    skipped = [run.result for run in runs if has_many_skipped_steps(run.result)]
    load = max(contending_cpu_load(run.result) for run in runs)
    notes = [
        (row.number, f"#{row.number}"),
        (row["simulated"], words("simulated")),
        (row["computed_on_cpu"], words("computed_on_cpu")),
        (row["mem_total_source"] == "hardware file", words("mem_of_file")),
        (row["profiled"], words("profiled")),
        (not runs[0].complete, words.state(str(row["status"]))),
        (open_ended and len(runs) == 1, words("unconverged")),
        (open_ended and len(runs) > 1, words("some_unconverged", open_ended, len(runs))),
        (resumed, words("resumed", resumed)),
        (repeated, words("repeated", repeated)),
        *((True, words("skipped", result["skipped_steps"], result["global_steps"])) for result in skipped),
        (load, words("not_alone", f"{100 * load:.0f} %")),
        (any(has_shared_devices(run.result) for run in runs), words("devices_shared")),
        *((True, f"{name}: {value}") for name, value in row.machine_differs.items()),
        (any(run.result.get("environment_changes") for run in runs), words("several_machines")),
        (any(run.result.get("missing_data") for run in runs), words("incomplete_data")),
        (len(runs) > 1, words("n_runs", len(runs))),
        (
            data not in (None, "record"),
            words("data_with_real_lengths" if has_real_lengths else "not_default_data", data),
        ),
    ]
    return [text for applies, text in notes if applies]


def format_cell(row: ReportRow, column: str) -> str:
    """Format a cell as published; "" without a value. Several runs: median [lowest, highest]."""
    if column in ("precision", "fix_hp"):
        tf32 = " (TF32)" if column == "precision" and row["precision"] == "fp32" and row["tf32"] else ""
        return str(row[column] if row[column] is not None else "") + tf32
    metric = _BY_COLUMN[column]
    total = row.median(metric.of) if metric.of else None
    text, spread = cell_text(metric, row.median(metric.name), total), row.spread(metric.name)
    return text if spread is None else f"{text} [{metric.form(spread[0])}, {metric.form(spread[1])}]"


class Note(NamedTuple):
    """Note on a row: a key of the translations and its values; the name of the row is the first value of the text."""

    key: str
    row: str
    values: Tuple[str, ...] = ()


def note_texts(notes: Iterable[Note], words: Translations) -> List[str]:
    """Return one text per note; rows with the same note share it."""
    rows: Dict[Tuple[str, Tuple[str, ...]], List[str]] = {}
    for note in notes:
        rows.setdefault((note.key, note.values), []).append(note.row)
    return [words(key, words.join(dict.fromkeys(names)), *values) for (key, values), names in rows.items()]


def _latest_verification(row: ReportRow) -> Optional[Dict[str, Any]]:
    """Return the latest verification of the same hardware, driver, precision and runtime."""
    run = row.typical
    driver, runtime = (run.environment.get(key) for key in ("driver", "runtime"))
    return latest_verification([run.path, Path.cwd()], str(row["hardware"]), driver, str(row["precision"]), runtime)


def _verification_note(row: ReportRow, name: str) -> Note:
    verification, precision = _latest_verification(row), str(row["precision"])
    if verification is None:
        return Note("unverified", f"{name} {precision}")
    key = "verified" if verification["passed"] else "verify_failed"
    return Note(key, name, (precision, str(verification.get("finished")).replace("T", " ")))


def verification_summary(row: ReportRow, words: Translations) -> str:
    """Summarise the latest verification of the device in one or two words."""
    verification = _latest_verification(row)
    if verification is None:
        return words("card_unverified")
    return words(
        "card_passed" if verification["passed"] else "card_failed", str(verification.get("finished")).partition("T")[0]
    )


def row_notes(row: ReportRow, words: Translations) -> List[Note]:
    """List the notes below the table: reasons for empty cells, and further information on the row."""
    name = unique_row_label(row, words)
    state = words.state(str(row["status"]))
    notes: List[Note] = []
    empty = [column for column in TABLE_COLUMNS[1:] if not format_cell(row, column)]
    if "mem" in empty:
        empty.remove("mem")
        notes.append(Note("why_no_mem", name))
    if not row.runs[0].complete:
        for column, reason in (("e2e_time", "why_no_e2e"), ("acc", "why_no_acc")):
            if column in empty:
                empty.remove(column)
                notes.append(Note(reason, name, (state,)))
        if "p_whole" in empty:  # no step has been measured: there are no rates and no step times
            of_steps = [column for column in empty if column.startswith(("p_", "step_"))]
            empty = [column for column in empty if column not in of_steps]
            notes.append(Note("why_no_step", name, (", ".join(of_steps), state)))
    if empty:
        notes.append(Note("why_no_value", name, (", ".join(empty),)))
    if len(row.runs) > 1:
        notes.append(Note("median_of", name, (str(len(row.runs)),)))
        counts = {metric.column: len(row.values(metric.name)) for metric in TABLE_METRICS}
        for column, count in counts.items():
            if 0 < count < len(row.runs):
                notes.append(Note("some_values", name, (column, str(count), str(len(row.runs)))))
    if row.differs:
        notes.append(Note("differs", name, (", ".join(f"{key}={row.differs[key]}" for key in sorted(row.differs)),)))
    for run in row.runs:
        notes += [Note("missing_data", name, (reason,)) for reason in text_list(run.result.get("missing_data"))]
        changes = text_list(run.result.get("environment_changes"))
        notes += [Note("machines_changed", name, ("; ".join(changes),))] if changes else []
    if not row["simulated"]:
        notes.append(_verification_note(row, name))
    notes += [Note("error_was", name, (str(run.result["error"]),)) for run in row.runs if run.result.get("error")]
    return notes
