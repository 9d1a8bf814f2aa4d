"""The files that rank 0 writes during a run: CSV tables row by row, result.json about once per second."""

import csv
import math
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from lit_glm.atomic_files import atomic_write, write_json
from lit_glm.runs import result

STEP_COLUMNS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "data_s", "compute_s", "step_s", "loss_scale")
EVAL_COLUMNS = ("step", "samples", "acc", "seconds")
MEMORY_COLUMNS = ("step", "seconds", "gib")
"""Of memory.csv: memory in use on the first rank's device, about once a second, seconds since the entry of train."""


def _to_csv_field(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


class AppendOnlyCSV:
    """A CSV file that is complete up to its last line at any moment."""

    def __init__(self, path: Path, columns: Sequence[str], keep_steps: Optional[int] = None) -> None:
        """Open a table.

        Args:
            path: the file.
            columns: its header.
            keep_steps: lines up to this step stay, later ones and a torn last one go; None: begin anew.
        """
        self._columns = columns
        self.rows: List[Dict[str, str]] = []
        found: List[Dict[str, str]] = []
        if keep_steps is not None and path.is_file():
            found = [row for row in read_csv_rows(path, columns) if _is_intact(row)]
            self.rows = [row for row in found if int(row["step"]) <= keep_steps]
        self.num_dropped_rows = len(found) - len(self.rows)
        """Lines that went."""
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(",".join(columns) + "\n")
            file.writelines(",".join(row[name] for name in columns) + "\n" for row in self.rows)
        self._file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """Append a line; a value that does not exist is an empty field."""
        self._file.write(",".join(_to_csv_field(values.get(name)) for name in self._columns) + "\n")
        self._file.flush()  # a run that is killed has this line

    def flush_to_disk(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def total(self, column: str, after_step: int = -1) -> float:
        """Sum of a column over the lines of later steps that were kept."""
        return sum(float(row[column]) for row in self.rows if int(row["step"]) > after_step)


def _is_intact(row: Dict[str, str]) -> bool:
    """Whether a line of an earlier part has a step, finite times, and numbers or nothing else."""
    try:
        numbers = {name: float(value or "nan") for name, value in row.items()}
    except ValueError:
        return False
    times = [value for name, value in numbers.items() if name == "seconds" or name.endswith("_s")]
    return row["step"].isdecimal() and all(map(math.isfinite, times))


def read_csv_rows(path: Path, columns: Sequence[str]) -> List[Dict[str, str]]:
    """The complete lines of a table; a last line without its line feed was being written when the run was killed."""
    text = path.read_text(encoding="utf-8", errors="replace")
    # Lines with NUL, which a loss of power leaves, end the reader of Python 3.8 with an error.
    complete = [line for line in text[: text.rfind("\n") + 1].splitlines() if "\0" not in line]
    rows = list(csv.DictReader(complete))
    return [row for row in rows if all(row.get(name) is not None for name in columns)]


_RESULT_EVERY_S = 1.0


class RunWriter:
    """A run that goes on continues its files; what it did before is read from them."""

    def __init__(self, run_dir: Path, steps_done: int, resumes: bool) -> None:
        """Open the files.

        Args:
            run_dir: the run folder.
            steps_done: steps that stand; later lines of an interrupted run are cut off.
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
        """Steps that were done, and done again because no checkpoint had them."""
        self._written = 0.0

    def previous_number(self, name: str) -> Optional[float]:
        """A figure of the earlier parts' result; None if it is missing or no finite number."""
        value = self.previous_result.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]

    @property
    def accuracy(self) -> Optional[float]:
        """Of the last evaluation that stands."""
        return float(self.evals.rows[-1]["acc"]) if self.evals.rows else None

    @property
    def evaluated_step(self) -> int:
        """Of that evaluation; -1 without one."""
        return int(self.evals.rows[-1]["step"]) if self.evals.rows else -1

    def write(self, row: Dict[str, Any], durable: bool = False) -> None:
        """Write result.json; `durable` waits until it and the tables are on the disk."""
        self._written = time.monotonic()
        if durable:
            self.steps.flush_to_disk()
            self.evals.flush_to_disk()
        write_json(self.path / result.RESULT_FILE, {**row, "schema_version": result.SCHEMA_VERSION}, durable)

    def step_column(self, column: str) -> List[float]:
        """A column of steps.csv, of the steps before an interruption too."""
        return [float(row[column]) for row in read_csv_rows(self.path / "steps.csv", STEP_COLUMNS)]

    def is_stale(self) -> bool:
        """Whether result.json is old enough to be written again."""
        return time.monotonic() - self._written > _RESULT_EVERY_S
