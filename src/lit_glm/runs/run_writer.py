"""The files that rank 0 writes during a run: CSV tables row by row, result.json about once per second."""

import csv
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from lit_glm.atomic_files import atomic_write, read_csv_rows, write_json
from lit_glm.errors import RunError
from lit_glm.metrics.registry import as_number
from lit_glm.runs import result

STEP_COLUMNS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "data_s", "compute_s", "step_s", "loss_scale")
EVAL_COLUMNS = ("step", "samples", "acc", "seconds")
MEMORY_COLUMNS = ("step", "seconds", "gib")
"""Columns of memory.csv: memory in use on rank 0's device, about once a second, in seconds since `train` started."""


@contextmanager
def reported_write(file: Path) -> Iterator[None]:
    """Turn an error of writing a run's file, such as a full disk, into one for the user.

    Raises:
        RunError: names the file.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write the run's files ({file.name}: {error.strerror})") from error


class AppendOnlyCSV:
    """CSV file of which every row is complete at any moment."""

    def __init__(self, path: Path, columns: Sequence[str], keep_steps: Optional[int] = None) -> None:
        """Open a table.

        Args:
            path: path of the file.
            columns: header of the file.
            keep_steps: keep rows up to this step, drop later and incomplete ones; None: start a new file.
        """
        self._path = path
        self.rows: List[Dict[str, str]] = []
        rows: List[Dict[str, str]] = []
        if keep_steps is not None and path.is_file():
            rows = [row for row in read_csv_rows(path, columns) if is_intact(row)]
            self.rows = [row for row in rows if int(row["step"]) <= keep_steps]
        self.num_dropped_rows = len(rows) - len(self.rows)
        """Number of rows of later steps that were dropped."""
        with reported_write(path):
            with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def add(self, **values: Any) -> None:
        """Append a row; a missing value becomes an empty field."""
        with reported_write(self._path):
            self._writer.writerow(values)
            self._file.flush()  # keeps this row if the run is killed

    def flush_to_disk(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._file.fileno())

    def total(self, column: str, after_step: int = -1) -> float:
        """Return the sum of a column over the kept rows after a step."""
        return sum(float(row[column]) for row in self.rows if int(row["step"]) > after_step)


def is_intact(row: Dict[str, str]) -> bool:
    """Return whether a row has a step and finite times, and all its other fields are numbers or empty."""
    try:
        numbers = {name: float(value or "nan") for name, value in row.items()}
    except ValueError:
        return False
    times = [value for name, value in numbers.items() if name == "seconds" or name.endswith("_s")]
    return row["step"].isdecimal() and all(map(math.isfinite, times))


_RESULT_EVERY_S = 1.0


class RunWriter:
    """Writer of a run's CSV tables and result.json; a resumed run continues its earlier files."""

    def __init__(self, run_dir: Path, steps_done: int, resumes: bool) -> None:
        """Open the files.

        Args:
            run_dir: the run folder.
            steps_done: completed steps; rows of later steps of an interrupted run are dropped.
            resumes: whether the folder holds an earlier part of this run.
        """
        self.path, self.resumes = run_dir, resumes
        keep = steps_done if resumes else None
        self.steps = AppendOnlyCSV(run_dir / "steps.csv", STEP_COLUMNS, keep)
        self.evals = AppendOnlyCSV(run_dir / "evals.csv", EVAL_COLUMNS, keep)
        self.memory = AppendOnlyCSV(run_dir / "memory.csv", MEMORY_COLUMNS, keep)
        self.previous_result: Dict[str, Any] = (result.read_result(run_dir) or {}) if resumes else {}
        self.interruptions = int(self.previous_number("interruptions") or 0) + int(resumes)
        self.repeated_steps = int(self.previous_number("repeated_steps") or 0) + self.steps.num_dropped_rows
        """Number of steps that were repeated because no checkpoint contained them."""
        self._written = 0.0

    def previous_number(self, name: str) -> Optional[float]:
        """Return a number from the result of the earlier parts; None if it is missing or not finite."""
        return as_number(self.previous_result.get(name))

    @property
    def accuracy(self) -> Optional[float]:
        """Accuracy of the last evaluation that was kept; None without one."""
        return float(self.evals.rows[-1]["acc"]) if self.evals.rows else None

    @property
    def evaluated_step(self) -> int:
        """Step of the last evaluation that was kept; -1 without one."""
        return int(self.evals.rows[-1]["step"]) if self.evals.rows else -1

    def write(self, row: Dict[str, Any], durable: bool = False) -> None:
        """Write result.json; `durable` waits until it and the tables are on the disk."""
        self._written, file = time.monotonic(), self.path / result.RESULT_FILE
        with reported_write(file):
            if durable:
                self.steps.flush_to_disk()
                self.evals.flush_to_disk()
            write_json(file, {**row, "schema_version": result.SCHEMA_VERSION}, durable)

    def step_column(self, column: str) -> List[float]:
        """Return a column of steps.csv, including the steps before an interruption."""
        return [float(row[column]) for row in read_csv_rows(self.path / "steps.csv", STEP_COLUMNS)]

    def is_stale(self) -> bool:
        """Return whether result.json is old enough to be written again."""
        return time.monotonic() - self._written > _RESULT_EVERY_S
