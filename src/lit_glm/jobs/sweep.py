"""A sweep: which combinations are done already, and one table over all of them."""

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional

from lit_glm.bench.result import COLUMNS, COMPLETE, cells, read_result, table
from lit_glm.config.schema import TrainConfig
from lit_glm.jobs.resume import runs_of
from lit_glm.jobs.spec import identity


def earlier_run(config: TrainConfig, run_dir: Path) -> Optional[Path]:
    """The run of the same configuration that a sweep left before: a complete one rather than an unfinished one."""
    runs = runs_of(identity(config), run_dir)
    complete = [folder for folder in runs if (read_result(folder) or {}).get("status") in COMPLETE]
    return max(complete or runs, key=lambda folder: folder.stat().st_mtime, default=None)


def summarise(run_dirs: List[Path], sweep_dir: Path) -> str:
    """Write sweep.csv and sweep.md, a row a run in the order of the sweep.

    Returns:
        The table for the terminal.
    """
    results: List[Dict[str, Any]] = [result for result in map(read_result, run_dirs) if result is not None]
    text = table(results)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / "sweep.md").write_text(text + "\n", encoding="utf-8")
    with (sweep_dir / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "scoring", "status", "run_dir"])
        for folder in run_dirs:
            result = read_result(folder)
            if result is None:
                writer.writerow([""] * len(COLUMNS) + ["", "failed", folder])
            else:
                writer.writerow([*cells(result), result["scoring"], result["status"], folder])
    return text
