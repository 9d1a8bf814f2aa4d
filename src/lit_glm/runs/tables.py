"""steps.csv and evals.csv: written line by line, read back and cut to length when a run goes on."""

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from lit_glm.files import replacing

STEPS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "data_s", "compute_s", "step_s", "loss_scale")
EVALS = ("step", "samples", "acc", "seconds")
MEMORY = ("step", "seconds", "gib")
"""Of memory.csv: memory in use on the first rank's device, about once a second, seconds since the entry of train."""


def _text(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


class Table:
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
            found = read_table(path, columns)
            self.rows = [row for row in found if int(row["step"]) <= keep_steps]
        self.cut = len(found) - len(self.rows)
        """Lines that went."""
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(",".join(columns) + "\n")
            file.writelines(",".join(row[name] for name in columns) + "\n" for row in self.rows)
        self._file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """Append a line; a value that does not exist is an empty field."""
        self._file.write(",".join(_text(values.get(name)) for name in self._columns) + "\n")
        self._file.flush()  # a run that is killed has this line

    def total(self, column: str) -> float:
        """Sum of a column over the lines that were kept."""
        return sum(float(row[column]) for row in self.rows if row[column])


def read_table(path: Path, columns: Sequence[str]) -> List[Dict[str, str]]:
    """The complete lines of a table; a last line without its line feed was being written when the run was killed."""
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1].splitlines()
    rows = list(csv.DictReader(complete))
    return [row for row in rows if all(row.get(name) is not None for name in columns)]
