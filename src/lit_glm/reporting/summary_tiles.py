"""The head of the page: a card a row, with what one wants to know of it at a glance."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

from lit_glm.metrics.registry import METRICS, cell_text
from lit_glm.reporting.i18n import Translations
from lit_glm.reporting.published_rows import load_published_rows
from lit_glm.reporting.row_format import format_cell, row_annotations, unique_row_label, verification_summary
from lit_glm.reporting.run_reader import ReportRow, ReportRun


@dataclass
class SummaryTile:
    """One row of the table."""

    title: str
    state: str
    """reached, missed or other: decides the colour."""
    said: str
    marks: List[str]
    items: List[Tuple[str, str]]
    """Label and value, those that are known."""
    origin: str
    """Command, commit and machine."""


def make_tiles(found: List[ReportRow], words: Translations) -> List[SummaryTile]:
    """A card a row, in their order."""
    published = load_published_rows()
    return [_make_tile(row, published, words) for row in found]


def _make_tile(row: ReportRow, published: List[Dict[str, Any]], words: Translations) -> SummaryTile:
    reached = [run for run in row.runs if run.complete and run.result.get("converged")]
    complete = [run for run in row.runs if run.complete]
    accuracy = format_cell(row, "acc") or "–"
    if reached and len(reached) == len(row.runs):
        state, said = "reached", words("card_reached", accuracy)
    elif complete:
        state, said = "missed", words("card_missed", accuracy)
    else:
        state, said = "other", words.state(str(row["status"]))
    items = [
        (
            words("card_time"),
            format_cell(row, "e2e_time") + " s" if state == "reached" and format_cell(row, "e2e_time") else "",
        ),
        *((METRICS[name].column, _with_unit(row, name)) for name in ("p_core", "p_train", "p_whole", "step_p99_s")),
        (METRICS["mem_actual_gib"].label(words.language), _with_unit(row, "mem_actual_gib")),
        ("mfu", "" if row["simulated"] else cell_text(METRICS["mfu"], row.median("mfu"))),
        (words("card_ratio"), _published_ratio(row, published)),
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
    more = [mark for mark in row_annotations(row, words) if mark != words("unconverged")]  # the card says that already
    return SummaryTile(title, state, said, more, known, " · ".join(part for part in origin if part))


def run_command_line(run: ReportRun) -> str:
    """The command line of a run, as it would be typed; "" where it is unknown."""
    known = run.environment.get("command")
    if not isinstance(known, list) or not known:
        return str(known or "")
    program = str(known[0])
    name = Path(program).stem
    typed = program if " " in program else f"python -m lit_glm.{name}"  # "lit-glm train" is kept as it is
    return " ".join([typed, *(shlex.quote(str(argument)) for argument in known[1:])])


def _with_unit(row: ReportRow, name: str) -> str:
    text = format_cell(row, METRICS[name].column)
    return f"{text} {METRICS[name].unit}" if text else ""


def _format_energy(row: ReportRow) -> str:
    joules, rate = row.median("energy_j"), row.median("samples_per_joule")
    return "" if joules is None else f"{joules / 1000:.1f} kJ" + ("" if rate is None else f", {rate:.3g} samples/J")


def _published_ratio(row: ReportRow, published: List[Dict[str, Any]]) -> str:
    """p_core over that of the published row of the same thing; "" where there is none or nothing compares."""
    own = row.median("p_core")
    keys = ("hardware", "topology", "precision", "scoring")
    same = [line for line in published if all(line.get(key) == row[key] for key in keys) and line.get("p_core")]
    settings = row.runs[0].settings
    whole = settings.get("model.name") == "glm_large" and settings.get("data.name") == "record"
    if (
        own is None
        or row["simulated"]
        or row["profiled"]
        or not whole
        or not same
        or bool(row["tf32"]) != same[0]["tf32"]
    ):
        return ""
    return f"{own / same[0]['p_core']:.2f}x ({same[0]['fix_hp']})"
