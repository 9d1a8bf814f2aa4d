"""Report document before any format: sections, tables and notes in one language."""

import shlex
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import yaml

from lit_glm.hardware.env import COMPILERS, FRAMEWORKS
from lit_glm.metrics.energy import in_kilojoules
from lit_glm.metrics.registry import METRICS, PUBLISHED_COLUMNS, TABLE_COLUMNS, cell_text
from lit_glm.reporting.definitions import ReportTable, Translations, distinct_texts, metric_definitions
from lit_glm.reporting.published_rows import load_published_rows, matching_rows, published_tables
from lit_glm.reporting.row_format import (
    Note,
    format_cell,
    label_with_annotations,
    note_texts,
    row_annotations,
    row_notes,
    unique_row_label,
    verification_summary,
)
from lit_glm.reporting.run_reader import ReportRow, ReportRun, group_into_rows
from lit_glm.runs.result import has_many_skipped_steps, text_list

TOPOLOGIES = ("1x1", "1x8", "2x8")
"""Topologies of a complete report, as published."""
_SCORINGS = ("published", "shared_context")
_DEPENDENCIES = ("torch", "pytorch-lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "h5py")
_OVERRIDABLE = ("machine", "device_name", "network", "driver", "image")
"""Environment entries that can be given as `report.*`."""


class EnvironmentEntry(NamedTuple):
    """One line of the environment; several values if runs differ, "" if unknown."""

    key: str
    label: str
    text: str


class Environment(NamedTuple):
    """Environment of one device type: entries by the key of their heading."""

    name: str
    sections: Dict[str, List[EnvironmentEntry]]


@dataclass
class Document:
    """Content of a report, independent of its format."""

    words: Translations
    environments: List[Environment]
    general: List[ReportTable]
    performance: List[ReportTable]
    published: ReportTable
    ratios: ReportTable
    other_device_types: ReportTable
    """Published rows of other device types."""
    missing: List[str]
    left_out: List[str]
    source_runs: ReportTable
    rows: List[ReportRow]


def make_document(
    runs: List[ReportRun], left_out: List[str], given: Dict[str, str], words: Translations, sort: Optional[str] = None
) -> Document:
    """Build the report document of some runs.

    Args:
        runs: at least one.
        left_out: messages about paths without a readable run.
        given: environment entries given on the command line, by the name of their `report.*` key.
        words: texts in the report's language.
        sort: metric to sort rows by, best first; None: by device type and topology.
    """
    rows = group_into_rows(runs)
    if sort is not None:
        rows.sort(key=lambda row: METRICS[sort].sort_key(row.median(sort), row.converged))
    rows.sort(key=lambda row: not row.runs[0].is_measurement)
    hardware = list(dict.fromkeys(str(row["hardware"]) for row in rows))
    environments = [
        _describe_environment(name, [run for run in runs if run.result["hardware"] == name], given, words)
        for name in hardware
    ]
    published, ratios = published_tables(rows, words)
    count = sum(line["hardware"] in hardware for line in load_published_rows())
    own_rows = published.rows[:count]  # rows of the document's device types come first
    return Document(
        words=words,
        environments=environments,
        general=[
            metric_definitions(name, [row for row in rows if row["hardware"] == name], words) for name in hardware
        ],
        performance=_performance_tables(rows, words),
        published=ReportTable(published.columns, own_rows, published.notes if own_rows else []),
        other_device_types=ReportTable(published.columns, published.rows[count:], [] if own_rows else published.notes),
        ratios=ratios,
        missing=_list_missing(rows, environments, words),
        left_out=left_out,
        source_runs=_source_runs_table(rows, words),
        rows=rows,
    )


# -- environment -------------------------------------------------------------------------------------------------


def _describe_environment(name: str, runs: List[ReportRun], given: Dict[str, str], words: Translations) -> Environment:
    known = [run.environment for run in runs if run.environment]

    def entry(key: str, value: Optional[Callable[[Dict[str, Any]], Any]] = None) -> EnvironmentEntry:
        values = [environment.get(key) if value is None else value(environment) for environment in known]
        return EnvironmentEntry(key, words(key), given.get(key) or "; ".join(distinct_texts(values)))

    def packages(environment: Dict[str, Any], names: Tuple[str, ...]) -> str:
        versions = environment.get("packages") or {}
        return ", ".join(f"{package} {versions[package]}" for package in names if package in versions)

    def framework(environment: Dict[str, Any]) -> str:
        vendor = packages(environment, FRAMEWORKS) if not environment.get("simulated") else ""
        return ", ".join(filter(None, [vendor, packages(environment, ("torch", "pytorch-lightning"))]))

    def compiler(environment: Dict[str, Any]) -> str:
        nothing = words("no_compiler") if environment.get("packages") else ""
        return packages(environment, COMPILERS) or nothing

    def driver(environment: Dict[str, Any]) -> Optional[str]:
        return environment.get("driver") or (None if environment.get("has_driver", True) else words("no_driver"))

    def image(environment: Dict[str, Any]) -> Optional[str]:
        return words("no_container") if environment.get("container_image") == "" else environment.get("container_image")

    def device(environment: Dict[str, Any]) -> Any:
        return environment.get("device_name") or next(iter(environment.get("devices") or []), None)

    hardware = [entry("machine"), entry("device_name", device), entry("network")]
    software = [entry("os"), entry("kernel"), entry("driver", driver), entry("image", image)]
    software += [entry("framework", framework), entry("compiler", compiler)]
    software += [entry("dependencies", lambda environment: packages(environment, _DEPENDENCIES))]
    return Environment(name, {"hardware_environment": hardware, "software_environment": software})


# -- figures -------------------------------------------------------------------------------------------------------


def _performance_tables(rows: List[ReportRow], words: Translations) -> List[ReportTable]:
    other_rows = [row for row in rows if not row.runs[0].is_measurement]
    rows = [row for row in rows if row.runs[0].is_measurement]
    tables = []
    for scoring in sorted({str(row["scoring"]) for row in rows}, key=lambda name: (name not in _SCORINGS, name)):
        heading = words(f"scoring_{scoring}") if scoring in _SCORINGS else f"scoring={scoring}"
        tables.append(_rows_table([row for row in rows if str(row["scoring"]) == scoring], heading, words))
    return [*tables, *([_rows_table(other_rows, words("other_runs"), words)] if other_rows else [])]


def _rows_table(rows: List[ReportRow], heading: str, words: Translations) -> ReportTable:
    notes = note_texts((note for row in rows for note in row_notes(row, words)), words)
    if any(row["simulated"] for row in rows):
        notes.insert(0, words("mark_means_simulated"))
    several = len({str(row["scoring"]) for row in rows}) > 1
    return ReportTable(
        [words("config"), *TABLE_COLUMNS[1:]],
        [
            [
                label_with_annotations(row, words, [f"scoring={row['scoring']}"] if several else []),
                *(format_cell(row, column) for column in TABLE_COLUMNS[1:]),
            ]
            for row in rows
        ],
        [words("unit"), *dict.fromkeys(notes)],
        heading,
    )


def _source_runs_table(rows: List[ReportRow], words: Translations) -> ReportTable:
    """Build the table of runs; with energy if that of any run is known."""
    has_energy = any(run.number("energy_j") is not None for row in rows for run in row.runs)
    head = [words("row"), "scoring", *map(words, ("status", "seed", "host"))]
    head += [words("energy"), words("samples_per_joule")] if has_energy else []
    lines = []
    for row in rows:
        for run in row.runs:
            joules, rate = run.number("energy_j"), run.number("samples_per_joule")
            energy = ["" if joules is None else in_kilojoules(joules), cell_text(METRICS["samples_per_joule"], rate)]
            line = [unique_row_label(row, words), str(run.result.get("scoring")), words.state(run.result["status"])]
            line += [str(run.result.get("seed", "")), str(run.environment.get("host", ""))]
            lines.append([*line, *(energy if has_energy else []), str(run.path)])
    return ReportTable([*head, words("folder")], lines)


# -- what is missing -------------------------------------------------------------------------------------------------


def _list_missing(rows: List[ReportRow], environments: List[Environment], words: Translations) -> List[str]:
    lines: List[str] = []
    notes: List[Note] = []
    for hardware, sections in environments:
        own = [row for row in rows if row["hardware"] == hardware]
        complete = [row for row in own if row.runs[0].complete and not row["simulated"]]
        measured = {(row["topology"], row["scoring"]) for row in complete}
        if all(row["simulated"] for row in own):
            lines.append(words("missing_simulated", hardware))
        for scoring in dict.fromkeys(row["scoring"] for row in own):
            missing = [topology for topology in TOPOLOGIES if (topology, scoring) not in measured]
            lines += [words("missing_topology", hardware, topology, scoring) for topology in missing]
        for run in (run for row in own for run in row.runs if not run.environment):
            lines.append(words("missing_environment_file", hardware, run.path))
        has_network = any(row.nodes[0] > 1 for row in own)
        for entry in chain(*sections.values()):
            if not entry.text and (entry.key != "network" or has_network):
                key = "missing_environment" if entry.key in _OVERRIDABLE else "missing_environment_plain"
                lines.append(words(key, hardware, entry.label, entry.key))
    for row in rows:
        name = unique_row_label(row, words)
        empty = [column for column in PUBLISHED_COLUMNS[1:] if not format_cell(row, column)]
        if empty:
            notes.append(Note("missing_cell", name, (", ".join(empty),)))
        if not row["simulated"] and any(run.complete and not run.result.get("converged") for run in row.runs):
            notes.append(Note("missing_target", name))
        if row.machine_differs:
            machine = ", ".join(f"{field}: {value}" for field, value in row.machine_differs.items())
            notes.append(Note("missing_same_machine", name, (machine,)))
        for run in row.runs:
            changes = text_list(run.result.get("environment_changes"))
            notes += [Note("machines_changed", name, ("; ".join(changes),))] if changes else []
            notes += [Note("missing_data", name, (reason,)) for reason in text_list(run.result.get("missing_data"))]
            if has_many_skipped_steps(run.result):
                counts = (str(run.result["skipped_steps"]), str(run.result["global_steps"]))
                notes.append(Note("missing_steps", name, counts))
    return list(dict.fromkeys([*lines, *note_texts(notes, words)]))


@dataclass
class SummaryTile:
    """Summary of one row of the table."""

    title: str
    state: str
    """reached, missed or other: decides the colour."""
    result: str
    """Whether the target was reached, with annotations."""
    items: List[Tuple[str, str]]
    """Labels and values that are known."""
    origin: str
    """Command, commit and machine."""


def make_tile(row: ReportRow, words: Translations) -> SummaryTile:
    """Create the tile of a row."""
    reached = [run for run in row.runs if run.complete and run.result.get("converged")]
    complete = [run for run in row.runs if run.complete]
    accuracy = format_cell(row, "acc") or "–"
    if reached and len(reached) == len(row.runs):
        state, outcome = "reached", words("card_reached", accuracy)
    elif complete:
        state, outcome = "missed", words("card_missed", accuracy)
    else:
        state, outcome = "other", words.state(str(row["status"]))
    items = [
        (words("card_time"), _with_unit(row, "e2e_time") if state == "reached" else ""),
        *((METRICS[name].column, _with_unit(row, name)) for name in ("p_core", "p_train", "p_whole", "step_p99_s")),
        (METRICS["mem_actual_gib"].label(words.language), _with_unit(row, "mem_actual_gib")),
        ("mfu", "" if row["simulated"] else cell_text(METRICS["mfu"], row.median("mfu"))),
        (words("card_ratio"), _published_ratio(row, words)),
        (words("energy"), _format_energy(row)),
        (words("card_verified"), "" if row["simulated"] else verification_summary(row, words)),
    ]
    typical = row.typical
    origin = [
        run_command_line(typical),
        str(typical.environment.get("git_commit") or "")[:12],
        str(typical.environment.get("host") or ""),
        str(next(iter(typical.environment.get("devices") or []), typical.environment.get("device_name") or "")),
    ]
    title = f"{unique_row_label(row, words)} {row['precision']} {row['scoring']}"
    known = [(label, value) for label, value in items if value]
    more = [mark for mark in row_annotations(row, words) if mark != words("unconverged")]  # shown by the state already
    result = words.with_note(outcome, words.join(more)) if more else outcome
    return SummaryTile(title, state, result, known, " · ".join(part for part in origin if part))


def run_command_line(run: ReportRun) -> str:
    """Return the command line of a run as it would be typed, of a sweep's run its own combination; "" if unknown."""
    known = run.environment.get("command")
    if not isinstance(known, list) or not known:
        return str(known or "")
    program = str(known[0])
    name = Path(program).stem
    typed = program if " " in program else f"python -m lit_glm.{name}"  # "lit-glm train" is kept as it is
    given = [str(argument) for argument in known[1:]]
    if {"-m", "--multirun"} & set(given):
        given = _own_overrides(run) + [text for text in given if text.startswith("--config-dir=")]
    return " ".join([typed, *map(shlex.quote, given)])


def _own_overrides(run: ReportRun) -> List[str]:
    """Return the overrides of a sweep's combination, as Hydra records them in the run folder."""
    try:
        overrides: Any = yaml.safe_load((run.path / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def _with_unit(row: ReportRow, name: str) -> str:
    text = format_cell(row, METRICS[name].column)
    return f"{text} {METRICS[name].unit}" if text else ""


def _format_energy(row: ReportRow) -> str:
    joules, rate = row.median("energy_j"), row.median("samples_per_joule")
    return "" if joules is None else f"{in_kilojoules(joules)} kJ" + ("" if rate is None else f", {rate:.3g} samples/J")


def _published_ratio(row: ReportRow, words: Translations) -> str:
    """Return p_core relative to the comparable published row; "" without one."""
    p_core, (lines, _) = row.median("p_core"), matching_rows(row, words)
    same = next((line for line in lines if line.get("p_core")), None)
    return "" if p_core is None or same is None else f"{p_core / same['p_core']:.2f}x ({same['fix_hp']})"
