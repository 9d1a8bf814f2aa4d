"""docs/schema.md is that of the registry, and names every field that the commands write."""

import importlib.util
import json
from pathlib import Path
from typing import Any, Set

import pytest

from conftest import TESTS, lit_glm_here
from lit_glm.metrics.registry import METRICS
from lit_glm.verification.acceptance import AcceptanceTest

SCRIPT = TESTS.parent / "scripts" / "write_schema.py"
spec = importlib.util.spec_from_file_location("write_schema", SCRIPT)
assert spec is not None
assert spec.loader is not None
schema: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schema)


def names(rows: Any) -> Set[str]:
    return {name for row in rows for name in row.split(", ")}


@pytest.mark.unit
def test_the_page_is_written_from_the_registry() -> None:
    assert schema.PAGE.read_text(encoding="utf-8") == schema.page()


@pytest.mark.unit
def test_every_field_that_is_written_is_documented(
    tmp_path: Path, finished_run: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads((finished_run("1x1")[0] / "result.json").read_text())
    assert set(result) - set(METRICS) - names(schema.RESULT) == set()
    stored = {metric.path.split(".")[0] or metric.name for metric in METRICS.values()}
    assert stored - set(result) == set()
    assert names(schema.RESULT) - set(result) == {"error", "mfu_above_one"}
    capfd.readouterr()
    assert lit_glm_here("plan", "hardware=r300", "topology=1x1", "--json", "hydra.run.dir=plan") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert set(row) == names(schema.PLAN)
    monkeypatch.setattr(AcceptanceTest, "checks", lambda _: iter(()))
    assert lit_glm_here("verify", "hardware=cpu", "--json", "hydra.run.dir=verify") == 0
    assert set(json.loads(Path("verify/verify.json").read_text())) == names(schema.VERIFY)
