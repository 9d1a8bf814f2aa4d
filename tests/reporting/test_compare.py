"""`report --compare A B`: two runs beside each other, step by step."""

from pathlib import Path
from typing import Any, List

import pytest

from lit_glm.report import main
from reporting.folders import make_run
from reporting.test_report import report, tables


def test_compare(tmp_path: Path, capfd: Any) -> None:
    a = make_run(tmp_path / "a", losses=[2.0, 1.5, 1.0])
    b = make_run(tmp_path / "b", "lr=2e-5", losses=[2.0, 1.5, 1.25, 1.0], p_core=8.0)
    status, text, _ = report(capfd, "--compare", a, b, "--max-loss-diff", "0.3")
    assert status == 0
    assert "largest difference: 0.25 (step 3: A 1, B 1.25)" in text
    assert "steps in common: 3" in text
    assert "first step that differs: 3" in text
    rows = {row[0]: row[1:] for table in tables(text) for row in table}
    assert rows["p_core"] == ["4", "8", "2.000"]
    assert rows["lr"] == ["1e-05", "2e-05"]
    status, _, said = report(capfd, "--compare", a, b, "--max-loss-diff", "0.2")
    assert (status, "0.25 is above 0.2" in said) == (1, True)
    status, _, said = report(capfd, "--compare", a, tmp_path / "nothing")
    assert status == 2


def test_compare_without_common_steps(tmp_path: Path, capfd: Any) -> None:
    a, b = make_run(tmp_path / "a", losses=[2.0, 1.5]), make_run(tmp_path / "b")
    (b / "steps.csv").write_text("step,loss\n")
    status, text, _ = report(capfd, "--compare", a, b)
    assert status == 0
    assert "No common steps." in text
    status, _, said = report(capfd, "--compare", a, b, "--max-loss-diff", "9")
    assert (status, "--max-loss-diff 9: no step in common, nothing was compared" in said) == (1, True)


def test_compare_reports_a_non_finite_loss_as_difference(tmp_path: Path, capfd: Any) -> None:
    a = make_run(tmp_path / "a", losses=[2.0, float("nan"), 1.0])
    b = make_run(tmp_path / "b", losses=[2.0, 1.5, 1.0])
    status, text, said = report(capfd, "--compare", a, b, "--max-loss-diff", "0.1")
    assert (status, "step 2" in text) == (1, True), said


@pytest.mark.parametrize(
    "more", [["--format", "html"], ["--lang", "zh"], ["third"], ["--check"], ["--best"], ["--sort", "acc"]]
)
def test_compare_rejects_unused_options(more: List[str], tmp_path: Path, capfd: Any) -> None:
    sides = [str(make_run(tmp_path / name)) for name in "ab"]
    assert main(["--compare", *sides, *more]) == 2
    assert "it does not take" in capfd.readouterr().err


@pytest.mark.parametrize("limit", ["nan", "-1"])
def test_compare_rejects_invalid_max_loss_diff(limit: str, tmp_path: Path, capfd: Any) -> None:
    sides = [str(make_run(tmp_path / name)) for name in "ab"]
    assert main(["--compare", *sides, "--max-loss-diff", limit]) == 2
    assert f"--max-loss-diff {limit}: must be at least 0" in capfd.readouterr().err


def test_compare_writes_into_a_folder(tmp_path: Path, capfd: Any) -> None:
    sides = [str(make_run(tmp_path / name)) for name in "ab"]
    assert main(["--compare", *sides, "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'out' / 'compare.md'}\n"
    assert "## Loss, step by step" in (tmp_path / "out" / "compare.md").read_text()
