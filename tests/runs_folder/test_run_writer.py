import csv
from pathlib import Path

from lit_glm.atomic_files import read_csv_rows
from lit_glm.runs.run_writer import EVAL_COLUMNS, AppendOnlyCSV


def test_incomplete_last_line_and_later_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "evals.csv"
    table = AppendOnlyCSV(path, EVAL_COLUMNS)
    for step in range(4):
        table.add(step=step, samples=4 * step, acc=0.5, seconds=1.5)
    with path.open("a") as file:
        file.write("4,16,0.")
    again = AppendOnlyCSV(path, EVAL_COLUMNS, keep_steps=2)
    assert again.num_dropped_rows == 1  # whole lines
    assert [row["step"] for row in again.rows] == ["0", "1", "2"]
    assert again.total("seconds") == 4.5
    again.add(step=3, samples=12, acc=None, seconds=2.0)
    assert [row["acc"] for row in read_csv_rows(path, EVAL_COLUMNS)] == ["0.5", "0.5", "0.5", ""]


def test_rows_before_a_field_that_is_too_long_are_read(tmp_path: Path) -> None:
    path = tmp_path / "evals.csv"
    table = AppendOnlyCSV(path, EVAL_COLUMNS)
    table.add(step=0, samples=0, acc=0.5, seconds=1.5)
    with path.open("a") as file:
        file.write(f"1,4,{'9' * (csv.field_size_limit() + 1)},1.5\n")
    assert [row["step"] for row in read_csv_rows(path, EVAL_COLUMNS)] == ["0"]


def test_evaluation_before_training_is_not_training_time(tmp_path: Path) -> None:
    table = AppendOnlyCSV(tmp_path / "evals.csv", EVAL_COLUMNS)
    for step in range(3):
        table.add(step=step, samples=4 * step, acc=0.5, seconds=1.5)
    resumed = AppendOnlyCSV(tmp_path / "evals.csv", EVAL_COLUMNS, keep_steps=2)
    assert resumed.total("seconds", after_step=0) == 3.0
