from pathlib import Path

from lit_glm.runs.run_writer import EVALS, Table, read_table


def test_a_torn_last_line_and_later_steps_go(tmp_path: Path) -> None:
    path = tmp_path / "evals.csv"
    table = Table(path, EVALS)
    for step in range(4):
        table.add(step=step, samples=4 * step, acc=0.5, seconds=1.5)
    with path.open("a") as file:
        file.write("4,16,0.")
    again = Table(path, EVALS, keep_steps=2)
    assert again.cut == 1  # whole lines
    assert [row["step"] for row in again.rows] == ["0", "1", "2"]
    assert again.total("seconds") == 4.5
    again.add(step=3, samples=12, acc=None, seconds=2.0)
    assert [row["acc"] for row in read_table(path, EVALS)] == ["0.5", "0.5", "0.5", ""]
