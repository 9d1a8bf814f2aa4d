"""The table of a sweep, of the notes that its jobs have left: sweep.md, sweep.csv, and the best of them."""

import csv
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from lit_glm.errors import InputError
from lit_glm.files import replacing, write_text
from lit_glm.runs.result import COMPLETE, read_result
from lit_glm.runs.row import COLUMNS, cells, less_is_better, table

NOTES = "jobs"
"""Folder of the notes, in the sweep's; it tells a sweep's folder from others."""


def summarise(sweep_dir: Path) -> Tuple[str, int]:
    """Write sweep.csv and sweep.md from the notes of the jobs: the best first, by the sweep's objective.

    Returns:
        The table for the terminal with a line a run beneath, and the exit status: the highest of any job.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((sweep_dir / NOTES).glob("*.json"))]
    objective = next((str(note["objective"]) for note in notes if note.get("objective")), "")
    pairs = sorted(((note, _result(note, sweep_dir)) for note in notes), key=lambda pair: _rank(pair[1], objective))
    notes, results = [note for note, _ in pairs], [result for _, result in pairs]
    text = table(results)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    write_text(sweep_dir / "sweep.md", text + "\n")
    with replacing(sweep_dir / "sweep.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "scoring", "status", "run_dir", "overrides", "taken_from"])
        for note, result in pairs:
            told = [note["run_dir"] or "", note["overrides"], note.get("taken_from", "")]
            writer.writerow([*cells(result), result["scoring"], result["status"], *told])
    lines = [text]
    if len(results) > 1 and _has(results[0], objective):
        lines += [_line(number, note, result, objective) for number, (note, result) in enumerate(pairs, 1)]
    lines += filter(None, [_best(notes, results, objective)])
    status = max([int(note["exit_status"]) for note in notes], default=0)
    return "\n".join(lines), status


def _has(result: Dict[str, Any], objective: str) -> bool:
    """Whether a run is complete and has the figure that the sweep is judged by."""
    return result.get("status") in COMPLETE and isinstance(result.get(objective), (int, float))


def _rank(result: Dict[str, Any], objective: str) -> Tuple[bool, float]:
    """Sorts the best first, and what has no figure last."""
    if not _has(result, objective):
        return True, 0.0
    value = float(result[objective])
    return False, value if less_is_better(objective) else -value


def _line(number: int, note: Dict[str, Any], result: Dict[str, Any], objective: str) -> str:
    value = f"{float(result[objective]):.6g}" if _has(result, objective) else str(result.get("status"))
    return f"{number}. {value}  {note['overrides'] or 'the only combination'}  {note['run_dir'] or ''}".rstrip()


def _result(note: Dict[str, Any], sweep_dir: Path) -> Dict[str, Any]:
    own: Dict[str, Any] = note["row"]
    if note["run_dir"] is None or note["exit_status"] == InputError.exit_status:
        return own  # what the folder holds is an earlier run's
    result = read_result(Path(note["run_dir"])) or own
    taken_from = note.get("taken_from")
    if not taken_from:
        return result
    inside = str(taken_from).startswith(f"{sweep_dir}/")
    return {**result, "taken_from": str(Path(taken_from).relative_to(sweep_dir)) if inside else taken_from}


def _best(notes: List[Dict[str, Any]], results: List[Dict[str, Any]], objective: str) -> Optional[str]:
    """A line that names the best complete run, which stands first; None without one."""
    if not results or not _has(results[0], objective):
        return None
    what = notes[0]["overrides"] or "the only combination"
    return f"lit_glm: best by {objective} ({float(results[0][objective]):.6g}): {what}, {notes[0]['run_dir']}"
