"""The table over a sweep, from the notes of its jobs."""

import csv
import json
from pathlib import Path
from typing import Any, Dict, Optional

from lit_glm.launch.sweep import summarise_sweep

ROW = {"hardware": "cpu", "topology": "1x2", "precision": "fp32", "scoring": "published", "status": "failed"}


def note(sweep: Path, number: int, run_dir: Optional[Path], status: int, fix_hp: str, n: Optional[int] = None) -> None:
    folder = None if run_dir is None else str(run_dir)
    content = {
        "run_dir": folder,
        "exit_status": status,
        "overrides": ["bs=1", f"n={number if n is None else n}"],
        "row": {**ROW, "fix_hp": fix_hp},
    }
    (sweep / "jobs").mkdir(exist_ok=True)
    (sweep / "jobs" / f"{number:05d}.json").write_text(json.dumps(content))


def left(run_dir: Path, **more: Any) -> Path:
    run_dir.mkdir()
    result: Dict[str, Any] = {**ROW, "status": "finished", "fix_hp": "bs=9,lr=1", "acc": 0.5, **more}
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def test_each_job_has_a_row_of_its_own(tmp_path: Path) -> None:
    note(tmp_path, 0, left(tmp_path / "0"), 0, "bs=9,lr=1")
    note(tmp_path, 1, left(tmp_path / "1"), 2, "bs=2,lr=1")  # refused, in the folder of an earlier run
    note(tmp_path, 2, left(tmp_path / "2", status="failed", acc=None), 1, "bs=9,lr=1")
    note(tmp_path, 3, tmp_path / "3", 1, "bs=4,lr=1")  # ended before it had a result
    note(tmp_path, 4, None, 1, "bs=abc,lr=1")
    text, status = summarise_sweep(tmp_path)
    assert status == 2
    with (tmp_path / "sweep.csv").open() as file:
        rows = [[row["fix_hp"], row["status"], row["acc"], row["overrides"]] for row in csv.DictReader(file)]
    assert rows == [
        ["bs=9,lr=1", "finished", "50.00%", "bs=1,n=0"],
        ["bs=2,lr=1", "failed", "", "bs=1,n=1"],
        ["bs=9,lr=1", "failed", "", "bs=1,n=2"],
        ["bs=4,lr=1", "failed", "", "bs=1,n=3"],
        ["bs=abc,lr=1", "failed", "", "bs=1,n=4"],
    ]
    assert text.count("cpu 1x2 (failed)") == 4
    assert "failed: n=" not in text  # these jobs wrote no reason
    assert (tmp_path / "sweep.md").read_text() == text + "\n"


def test_combination_repeated_by_a_search_is_one_row(tmp_path: Path) -> None:
    again = left(tmp_path / "0")
    note(tmp_path, 0, again, 0, "bs=9,lr=1")
    note(tmp_path, 1, again, 0, "bs=9,lr=1", n=0)
    note(tmp_path, 2, again, 3, "bs=9,lr=1")  # a job that failed in this folder keeps its row
    status = summarise_sweep(tmp_path)[1]
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["overrides"] for row in csv.DictReader(file)] == ["bs=1,n=0", "bs=1,n=2"]
    assert status == 3


def test_combinations_that_share_a_run_are_all_listed(tmp_path: Path) -> None:
    """They differ in keys that change no result, as hardware.monitor_interval_s."""
    for number in range(2):
        note(tmp_path, number, left(tmp_path / "0") if number == 0 else tmp_path / "0", 0, "bs=9,lr=1")
    summarise_sweep(tmp_path)
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["overrides"] for row in csv.DictReader(file)] == ["bs=1,n=0", "bs=1,n=1"]
