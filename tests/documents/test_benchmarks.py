"""Benchmarks are run by hand: what they import must at least exist."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_benchmark_imports_exist(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    assert "main" in runpy.run_path(str(file), run_name="benchmark") or file.stem == "reference"
