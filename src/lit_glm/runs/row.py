"""A result as a line of the published table, with what a reader must know before comparing it."""

from typing import Any, Dict, List

from lit_glm.runs.result import COMPLETE

COLUMNS = ("config", "precision", "fix_hp", "e2e_time", "p_whole", "p_train", "p_core", "acc", "mem")
"""The published table's, in its order (its first column is named 配置 there)."""
_SKIPPED_SHARE = 0.01
OTHERS_SHARE = 0.1
"""Share of the machine that others may take before a reader must be told."""


_LESS_IS_BETTER = ("time", "mem_", "rank_imbalance", "skipped_steps", "num_trained_samples", "global_steps", "energy_j")


def less_is_better(figure: str) -> bool:
    """Whether a figure of a result is the better the lower it is."""
    return any(part in figure for part in _LESS_IS_BETTER)


def skips_much(result: Dict[str, Any]) -> bool:
    """Whether more than a hundredth of a run's steps were without an update."""
    skipped, steps = result.get("skipped_steps"), result.get("global_steps")
    known = isinstance(skipped, int) and isinstance(steps, int)
    return known and steps > 0 and skipped > _SKIPPED_SHARE * steps  # type: ignore[operator]


def not_alone(result: Dict[str, Any]) -> bool:
    """Whether others took more than a tenth of the machine, or computed on the same cards."""
    load, on_cards = result.get("others_load"), result.get("others_on_cards")
    much = isinstance(load, float) and load > OTHERS_SHARE
    return much or (isinstance(on_cards, int) and on_cards > 0)


def marks(result: Dict[str, Any]) -> List[str]:
    """What is to be known of a row."""
    said = []
    if result.get("simulated"):
        said.append("simulated")
    if result.get("profiled"):
        said.append("profiled")
    if result.get("status") not in COMPLETE:
        said.append(str(result.get("status")))
    if result.get("interruptions"):
        repeated = result.get("repeated_steps")
        again = f", {repeated} steps repeated" if repeated else ""
        said.append(f"resumed {result['interruptions']}x{again}")
    if skips_much(result):
        said.append(f"{result['skipped_steps']} of {result['global_steps']} steps skipped")
    if not_alone(result):
        said.append(f"beside others: {result.get('others_load') or 0:.0%} of the machine")
    if result.get("taken_from"):
        said.append(f"taken from {result['taken_from']}")
    return said


def cells(result: Dict[str, Any]) -> List[str]:
    """A result in the published formats, one text a column; empty where nothing was measured."""

    def number(name: str, digits: int) -> str:
        return "" if result.get(name) is None else f"{result[name]:.{digits}f}"

    said = marks(result)
    mark = f" ({', '.join(said)})" if said else ""
    actual, total = number("mem_actual_gib", 1), number("mem_total_gib", 1)
    return [
        f"{result['hardware']} {result['topology']}{mark}",
        str(result["precision"]),
        str(result["fix_hp"]),
        number("e2e_time", 2),
        number("p_whole", 2),
        number("p_train", 2),
        number("p_core", 2),
        "" if result.get("acc") is None else f"{100 * result['acc']:.2f}%",
        f"{actual}/{total}" if actual and total else "",
    ]


def table(results: List[Dict[str, Any]]) -> str:
    """Results as a Markdown table, columns and order as published."""
    return lines_of([list(COLUMNS), *(cells(result) for result in results)])


def lines_of(rows: List[List[str]]) -> str:
    """Rows of text as a Markdown table, columns aligned; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
