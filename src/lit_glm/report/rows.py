"""A row as the table shows it: its name, its marks, its cells in the published formats, why a cell is empty."""

from typing import Callable, Dict, List

from lit_glm.report.runs import Row, Run
from lit_glm.report.words import Words

_SECONDS: Callable[[float], str] = "{:.2f}".format
_FORMATS: Dict[str, Callable[[float], str]] = {
    "e2e_time": _SECONDS,
    "p_whole": _SECONDS,
    "p_train": _SECONDS,
    "p_core": _SECONDS,
    "acc": lambda share: f"{100 * share:.2f}%",
    "mem": "{:.1f}".format,
}


def label(row: Row, words: Words) -> str:
    """Name of a row, such as `CARD 1x8`: the card's name where it is short, else the hardware file's."""
    card = str(row.runs[0].settings.get("hardware.card") or "")
    hardware = str(row["hardware"])
    short = card if card and card.lower().replace("-", "_") == hardware.lower() else hardware
    return words.config(short, str(row["topology"]))


def full_label(row: Row, words: Words) -> str:
    """Name of a row that no other row has: with its hyperparameters, and numbered where even these agree."""
    number = f" #{row.number}" if row.number else ""
    return f"{label(row, words)} {row['fix_hp']}{number}"


def marks(row: Row, words: Words) -> List[str]:
    """What a reader must know before comparing the row."""
    said: List[str] = [f"#{row.number}"] if row.number else []
    if row["simulated"]:
        said.append(words("simulated"))
    status = str(row["status"])
    if not row.runs[0].complete:
        known = status in ("running", "killed", "interrupted", "failed")
        said.append(words(status) if known else status)
    open_ended = [run for run in row.runs if run.complete and not run.result.get("converged")]
    if open_ended:
        several = len(row.runs) > 1
        said.append(words("some_unconverged", len(open_ended), len(row.runs)) if several else words("unconverged"))
    resumed = sum(_count(run) for run in row.runs)
    if resumed:
        said.append(words("resumed", resumed))
    if len(row.runs) > 1:
        said.append(words("n_runs", len(row.runs)))
    data = row.runs[0].settings.get("data.name")
    if data not in (None, "record"):
        said.append(words("not_default_data", data))
    return said


def _count(run: Run) -> int:
    interruptions = run.result.get("interruptions")
    return interruptions if isinstance(interruptions, int) else 0


def cell(row: Row, column: str) -> str:
    """One cell in the published format; "" where nothing was measured. Several runs: median [lowest, highest]."""
    if column in ("precision", "fix_hp"):
        tf32 = " (TF32)" if column == "precision" and row["precision"] == "fp32" and row["tf32"] else ""
        return str(row[column] if row[column] is not None else "") + tf32
    form = _FORMATS[column]
    key = "mem_actual_gib" if column == "mem" else column
    middle, spread = row.median(key), row.spread(key)
    if middle is None:
        return ""
    text = form(middle)
    if column == "mem":
        total = row.median("mem_total_gib")
        if total is None:
            return ""
        text = f"{text}/{form(total)}"
    return text if spread is None else f"{text} [{form(spread[0])}, {form(spread[1])}]"


def reasons(row: Row, words: Words) -> List[str]:
    """Lines below the table: why cells are empty, what else is behind the row."""
    name = full_label(row, words)
    state = str(row["status"])
    lines = []
    rates = [column for column in ("p_whole", "p_train", "p_core") if not cell(row, column)]
    if rates:
        lines.append(words("why_no_step", name, ", ".join(rates), state))
    if not cell(row, "e2e_time"):
        lines.append(words("why_no_e2e", name, state))
    if not cell(row, "acc"):
        lines.append(words("why_no_acc", name, state))
    if not cell(row, "mem"):
        lines.append(words("why_no_mem", name))
    if len(row.runs) > 1:
        lines.append(words("median_of", name, len(row.runs)))
    if row.differs:
        lines.append(words("differs", name, ", ".join(f"{key}={value}" for key, value in sorted(row.differs.items()))))
    lines += [words("error_was", name, run.result["error"]) for run in row.runs if run.result.get("error")]
    return lines
