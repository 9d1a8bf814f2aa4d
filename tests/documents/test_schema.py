"""docs/schema.md is that of the registry, and names every field that the commands write."""

import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, List, Set

import pytest

from conftest import TESTS, lit_glm_here
from lit_glm.batch_size_search import Search, Trial
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.launch.sweep import summarise_sweep
from lit_glm.metrics.registry import METRICS
from lit_glm.runs.run_writer import MEMORY_COLUMNS
from lit_glm.tune import TuneConfig
from lit_glm.verification.acceptance import AcceptanceTest

SCRIPT = TESTS.parent / "scripts" / "write_schema.py"
spec = importlib.util.spec_from_file_location("write_schema", SCRIPT)
assert spec is not None
assert spec.loader is not None
schema: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schema)


def names(rows: Any) -> Set[str]:
    return {name for row in rows for name in row.split(", ")}


def in_order(rows: Any) -> List[str]:
    return [name for row in rows for name in row.split(", ")]


@pytest.mark.unit
def test_schema_page_matches_the_registry() -> None:
    assert schema.PAGE.read_text(encoding="utf-8") == schema.page()


def test_every_field_that_is_written_is_documented(
    tmp_path: Path, finished_run: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads((finished_run("1x1")[0] / "result.json").read_text())
    assert set(result) - set(METRICS) - names(schema.RESULT) == set()
    stored = {metric.path.split(".")[0] or metric.name for metric in METRICS.values()}
    assert stored - set(result) == set()
    assert names(schema.RESULT) - set(result) == {"error", "mfu_above_one"}
    run = finished_run("1x1")[0]
    for file, rows in (("steps", schema.STEPS), ("evals", schema.EVALS), ("devices", schema.DEVICES)):
        assert (run / f"{file}.csv").read_text().splitlines()[0] == ",".join(in_order(rows))
    assert ",".join(MEMORY_COLUMNS) == ",".join(in_order(schema.MEMORY))
    assert set(json.loads((run / "environment.json").read_text())) == names(schema.ENVIRONMENT)
    assert lit_glm_here("evaluate", str(run), "hydra.run.dir=scores") == 0
    assert set(json.loads(Path("scores/evaluation.json").read_text())) == names(schema.EVALUATION)
    prediction = json.loads(Path("scores/predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(prediction) == names(schema.PREDICTIONS)
    (tmp_path / "sweep" / "jobs").mkdir(parents=True)
    record = {"run_dir": str(run), "exit_status": 0, "overrides": ["bs=1"], "row": {}}
    (tmp_path / "sweep" / "jobs" / "00000.json").write_text(json.dumps(record))
    summarise_sweep(tmp_path / "sweep")
    assert (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()[0] == ",".join(in_order(schema.SWEEP))
    config: Any = validate_config(compose_config("tune", ["experiment=debug"]), TuneConfig)
    (tmp_path / "search").mkdir()
    Search(config, tmp_path / "search", [])._write()
    assert set(json.loads(Path("search/tune.json").read_text())) == names(schema.TUNE)
    assert {entry.name for entry in fields(Trial)} == set(
        re.findall(r"\w+", re.sub(r"^a list: |\(.*?\)", "", schema.TUNE["trials"]))
    )
    capfd.readouterr()
    assert lit_glm_here("plan", "experiment=debug", "hardware=r300", "--json", "hydra.run.dir=plan") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert set(row) == names(schema.PLAN)
    monkeypatch.setattr(AcceptanceTest, "checks", lambda _: iter(()))
    assert lit_glm_here("verify", "model=glm_tiny", "--json", "hydra.run.dir=verify") == 0
    assert set(json.loads(Path("verify/verify.json").read_text())) == names(schema.VERIFY)
