"""The files of a run while it goes, written by the first rank: tables line by line, result.json about once a second."""

import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from lit_glm.files import write_json
from lit_glm.runs import result
from lit_glm.runs.tables import EVALS, MEMORY, STEPS, Table, read_table

_RESULT_EVERY_S = 1.0


class LiveRun:
    """A run that goes on continues its files; what it did before is read from them."""

    def __init__(self, run_dir: Path, steps_done: int, resumes: bool) -> None:
        """Open the files.

        Args:
            run_dir: the run folder.
            steps_done: steps that stand; later lines of an interrupted run are cut off.
            resumes: whether the folder holds an earlier part of this run.
        """
        self.path = run_dir
        keep = steps_done if resumes else None
        self.steps = Table(run_dir / "steps.csv", STEPS, keep)
        self.evals = Table(run_dir / "evals.csv", EVALS, keep)
        self.memory = Table(run_dir / "memory.csv", MEMORY, keep)
        self.before: Dict[str, Any] = (result.read_result(run_dir) or {}) if resumes else {}
        self.interruptions = int(self.before.get("interruptions") or 0) + int(resumes)
        self.repeated_steps = int(self.before.get("repeated_steps") or 0) + self.steps.cut
        """Steps that were done, and done again because no checkpoint had them."""
        self._written = 0.0

    @property
    def accuracy(self) -> Optional[float]:
        """Of the last evaluation that stands."""
        return float(self.evals.rows[-1]["acc"]) if self.evals.rows else None

    @property
    def evaluated_step(self) -> int:
        """Of that evaluation; -1 without one."""
        return int(self.evals.rows[-1]["step"]) if self.evals.rows else -1

    def write(self, row: Dict[str, Any]) -> None:
        """Write result.json."""
        self._written = time.monotonic()
        write_json(self.path / result.FILE, {**row, "schema_version": result.SCHEMA_VERSION})

    def of_steps(self, column: str) -> List[float]:
        """A column of steps.csv, of the steps before an interruption too."""
        return [float(row[column]) for row in read_table(self.path / "steps.csv", STEPS)]

    def stale(self) -> bool:
        """Whether result.json is old enough to be written again."""
        return time.monotonic() - self._written > _RESULT_EVERY_S
