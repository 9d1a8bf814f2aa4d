"""The head of the page: a card a row, with what one wants to know of it at a glance."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

from lit_glm.reporting.i18n import Words
from lit_glm.reporting.published_rows import load
from lit_glm.reporting.row_format import cell, full_label, marks, verified
from lit_glm.reporting.run_reader import Row, Run


@dataclass
class Card:
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


def cards(found: List[Row], words: Words) -> List[Card]:
    """A card a row, in their order."""
    published = load()
    return [_card(row, published, words) for row in found]


def _card(row: Row, published: List[Dict[str, Any]], words: Words) -> Card:
    reached = [run for run in row.runs if run.complete and run.result.get("converged")]
    complete = [run for run in row.runs if run.complete]
    accuracy = cell(row, "acc") or "–"
    if reached and len(reached) == len(row.runs):
        state, said = "reached", words("card_reached", accuracy)
    elif complete:
        state, said = "missed", words("card_missed", accuracy)
    else:
        state, said = "other", words.state(str(row["status"]))
    items = [
        (words("card_time"), cell(row, "e2e_time") + " s" if state == "reached" and cell(row, "e2e_time") else ""),
        ("p_core", cell(row, "p_core")),
        ("p_train", cell(row, "p_train")),
        ("p_whole", cell(row, "p_whole")),
        (words("mem"), f"{cell(row, 'mem')} GiB" if cell(row, "mem") else ""),
        ("mfu", "" if row["simulated"] else _share(row.median("mfu"))),
        (words("card_ratio"), _ratio(row, published)),
        (words("energy"), _joules(row)),
        (words("card_verified"), "" if row["simulated"] else verified(row, words)),
    ]
    typical = row.typical
    origin = [
        command_of(typical),
        str(typical.environment.get("git_commit") or "")[:12],
        str(typical.environment.get("host") or ""),
        str(next(iter(typical.environment.get("cards") or []), typical.environment.get("card") or "")),
    ]
    title = f"{full_label(row, words)} {row['precision']} {row['scoring']}"
    known = [(label, value) for label, value in items if value]
    more = [mark for mark in marks(row, words) if mark != words("unconverged")]  # the card says that already
    return Card(title, state, said, more, known, " · ".join(part for part in origin if part))


def command_of(run: Run) -> str:
    """The command line of a run, as it would be typed; "" where it is unknown."""
    known = run.environment.get("command")
    if not isinstance(known, list) or not known:
        return str(known or "")
    program = str(known[0])
    name = Path(program).stem
    typed = program if " " in program else f"python -m lit_glm.{name}"  # "lit-glm train" is kept as it is
    return " ".join([typed, *(shlex.quote(str(argument)) for argument in known[1:])])


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _joules(row: Row) -> str:
    joules, rate = row.median("energy_j"), row.median("samples_per_joule")
    return "" if joules is None else f"{joules / 1000:.1f} kJ" + ("" if rate is None else f", {rate:.3g} samples/J")


def _ratio(row: Row, published: List[Dict[str, Any]]) -> str:
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
