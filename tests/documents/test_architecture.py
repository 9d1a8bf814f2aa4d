"""docs/architecture.md names the modules that handle a job between the command line and a rank's exit."""

import ast
import re
from pathlib import Path

import pytest

import lit_glm

SRC = Path(lit_glm.__file__).parent
PAGE = Path(__file__).parent.parent.parent / "docs" / "architecture.md"


@pytest.mark.unit
def test_architecture_page_lists_modules_that_import_job_spec() -> None:
    importing = {
        ".".join(file.relative_to(SRC).with_suffix("").parts)
        for file in SRC.rglob("*.py")
        if re.search(r"import [^\n]*\bJobSpec\b|^class JobSpec\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert named == importing
    assert len(named) <= 20


@pytest.mark.unit
def test_launch_modules_do_not_read_sys_argv() -> None:
    """Except the entry of each process, under `if __name__`."""
    for file in (SRC / "launch").glob("*.py"):
        body = file.read_text(encoding="utf-8").split('if __name__ == "__main__"')[0]
        assert "sys.argv" not in body, file


@pytest.mark.unit
def test_file_and_function_lengths_are_limited() -> None:
    for file in SRC.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, (file, node.name)
