"""The table of a sweep, of the notes that its jobs have left: sweep.md, sweep.csv, and the best of them."""

import csv
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from lit_glm.errors import InputError
from lit_glm.files import replacing, write_text
from lit_glm.runs.result import COMPLETE, read_result
from lit_glm.runs.row import COLUMNS, cells, table

NOTES = "jobs"
"""Folder of the notes, in the sweep's; it tells a sweep's folder from others."""
_LESS_IS_BETTER = ("time", "mem_", "rank_imbalance", "skipped_steps", "num_trained_samples", "global_steps")


def summarise(sweep_dir: Path) -> Tuple[str, int]:
    """Write sweep.csv and sweep.md from the notes of the jobs, a row a job in the order of the sweep.

    Returns:
        The table for the terminal with the best run beneath, and the exit status: the highest of any job.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((sweep_dir / NOTES).glob("*.json"))]
    results = [_result(note, sweep_dir) for note in notes]
    text = table(results)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    write_text(sweep_dir / "sweep.md", text + "\n")
    with replacing(sweep_dir / "sweep.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "scoring", "status", "run_dir", "overrides", "taken_from"])
        for note, result in zip(notes, results):
            told = [note["run_dir"] or "", note["overrides"], note.get("taken_from", "")]
            writer.writerow([*cells(result), result["scoring"], result["status"], *told])
    best = _best(notes, results)
    status = max([int(note["exit_status"]) for note in notes], default=0)
    return "\n".join(filter(None, [text, best])), status


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


def _best(notes: List[Dict[str, Any]], results: List[Dict[str, Any]]) -> Optional[str]:
    """A line that names the best complete run by the sweep's objective; None without one."""
    objective = next((str(note["objective"]) for note in notes if note.get("objective")), "")
    known = [
        (float(result[objective]), note)
        for note, result in zip(notes, results)
        if result.get("status") in COMPLETE and isinstance(result.get(objective), (int, float))
    ]
    if not known:
        return None
    less = any(part in objective for part in _LESS_IS_BETTER)
    value, note = (min if less else max)(known, key=lambda entry: entry[0])
    what = note["overrides"] or "the only combination"
    return f"lit_glm: best by {objective} ({value:.6g}): {what}, {note['run_dir']}"
