"""Report document as Markdown, CSV and HTML; all content is decided in `document`."""

import base64
import csv
import hashlib
import io
from pathlib import Path
from typing import Any, List

from lit_glm.metrics.registry import TABLE_COLUMNS, TABLE_METRICS
from lit_glm.reporting.definitions import ReportTable
from lit_glm.reporting.document import Document
from lit_glm.reporting.row_format import format_cell, row_annotations, row_label
from lit_glm.runs.result import markdown_table


def _escape_markdown(text: str) -> str:
    """Escape text for Markdown, so that names cannot add cells, lines, links or tags."""
    for char in "\\`*|<>":
        text = text.replace(char, "\\" + char)
    return " ".join(text.replace("](", "]\\(").split())


def table_lines(table: ReportTable) -> List[str]:
    """Format a table as Markdown with aligned columns."""
    rows = [[_escape_markdown(text) for text in row] for row in (table.columns, *table.rows)]
    return markdown_table(rows).split("\n")


def _note_lines(lines: List[str]) -> List[str]:
    return ["", *(f"- {_escape_markdown(line)}" for line in lines)] if lines else []


def markdown(document: Document, generated: str) -> str:
    """Format the document as Markdown."""
    words = document.words
    out = [f"# {words('title')}", "", _escape_markdown(generated), "", f"## {words('environment')}"]
    several = len(document.environments) > 1
    for environment in document.environments:
        out += ["", f"### {_escape_markdown(environment.name)}"] if several else []
        for heading, entries in environment.sections.items():
            out += ["", f"{'####' if several else '###'} {words(heading)}", ""]
            out += [f"- {entry.label}: {_escape_markdown(entry.text)}".rstrip() for entry in entries]
    out += ["", f"## {words('runs')}", "", f"### {words('general')}"]
    for table in document.general:
        out += ["", f"#### {_escape_markdown(table.heading)}"] if several else []
        out += ["", *table_lines(table)]
    out += ["", f"### {words('performance')}"]
    for table in document.performance:
        out += ["", f"#### {_escape_markdown(table.heading)}", "", *table_lines(table), *_note_lines(table.notes)]
    out += ["", f"## {words('published')}"]
    out += ["", *table_lines(document.published)] if document.published.rows else []
    out += _note_lines(document.published.notes)
    if document.other_device_types.rows:
        out += ["", f"### {words('other_device_types')}", "", *table_lines(document.other_device_types)]
    out += ["", f"### {words('ratios')}"]
    out += ["", *table_lines(document.ratios)] if document.ratios.rows else []
    out += _note_lines(document.ratios.notes)
    out += ["", f"## {words('missing')}", *_note_lines(document.missing or [words("nothing_missing")])]
    if document.left_out:
        out += ["", f"## {words('left_out')}", *_note_lines(document.left_out)]
    out += ["", f"## {words('runs_behind')}", "", *table_lines(document.source_runs)]
    return "\n".join(out) + "\n"


def csv_text(document: Document) -> str:
    """Format the rows of all tables as CSV, one line each: columns as displayed, then metrics as plain numbers."""
    words = document.words
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    figures = [name for metric in TABLE_METRICS for name in (metric.name, metric.of) if name]
    more = ("scoring", "status", "converged", "simulated", "runs", "marks", "run_dirs", "other_run")
    ends = [f"{name}_{end}" for name in figures for end in ("median", "min", "max")]
    writer.writerow([words("config"), *TABLE_COLUMNS[1:], *more, *ends])
    for row in document.rows:
        shown = [format_cell(row, column).partition(" [")[0] for column in TABLE_COLUMNS[1:]]
        statuses = ", ".join(dict.fromkeys(str(run.result.get("status")) for run in row.runs))
        state = [row["scoring"], statuses, row.converged, bool(row["simulated"]), len(row.runs)]
        folders = ";".join(str(run.path) for run in row.runs)
        numbers = [
            "" if value is None else value
            for name in figures
            for value in (row.median(name), *(row.spread(name) or (row.median(name), row.median(name))))
        ]
        marks = "; ".join(row_annotations(row, words))
        cells = (row_label(row, words), *shown, *state, marks, folders, not row.runs[0].is_measurement)
        writer.writerow([*map(_escape_formula, cells), *numbers])
    return out.getvalue()


def _escape_formula(value: Any) -> Any:
    """Prefix strings that a spreadsheet would interpret as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def html(document: Document, generated: str) -> str:
    """Format the document as one self-contained HTML file with embedded plots."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from lit_glm.reporting.document import make_tile
    from lit_glm.reporting.plots import draw_plots

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(str(folder)), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = (folder / "page.js").read_text(encoding="utf-8")
    figures, notes = draw_plots(document.rows, document.words)
    return environment.get_template("page.html").render(
        document=document,
        words=document.words,
        generated=generated,
        figures=figures,
        figure_notes=notes,
        tiles=[make_tile(row, document.words) for row in document.rows],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # the policy allows only this
    )
