"""The hash by which a run folder is found and resumed: it stays when keys are added."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict

import pytest

from conftest import lit_glm_here, rows, tree_digest
from lit_glm.config.schema import RunConfig, TrainConfig, iter_keys, key
from lit_glm.runs.job_spec import JobSpec, config_hash, hashed_settings, read_job_json

STORED = Path(__file__).parent.parent / "cases" / "job_0_2_0"
"""job.json as lit_glm 0.2.0 wrote it. Never written again: what is added later must not change its hash."""


def test_the_hash_of_a_stored_job_of_0_2_0() -> None:
    job = JobSpec.read(STORED)
    assert config_hash(job.config) == "f950a24e564fee11"
    assert (read_job_json(STORED) or {})["config_hash"] == "f950a24e564fee11"


def test_keys_added_since_0_2_0_declare_version_and_neutral_value() -> None:
    def flat(node: Dict[str, Any], prefix: str = "") -> Any:
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else ()

    stored = set(flat((read_job_json(STORED) or {})["config"]))
    for name, _, entry in iter_keys(JobSpec.read(STORED).config):
        if name not in stored:
            declared = entry.metadata
            assert ("added" in declared and "neutral" in declared) or declared.get("hashed") is False, name


@dataclass
class LaterRun(RunConfig):
    """RunConfig of a later version."""

    window: int = key(8, added="0.3.0", neutral=0)
    verbose: bool = key(False, hashed=False)


@dataclass
class LaterConfig(TrainConfig):
    run: LaterRun = field(default_factory=LaterRun)  # type: ignore[assignment]


def test_neutral_key_of_a_later_version_keeps_the_config_hash() -> None:
    before = config_hash(TrainConfig())
    later: Any = LaterConfig(run=LaterRun(window=0))
    assert config_hash(later) == before
    assert config_hash(replace(later, run=LaterRun(window=0, verbose=True))) == before
    assert config_hash(replace(later, run=LaterRun(window=8))) != before
    assert "run.window" not in hashed_settings(later)


@pytest.mark.process
def test_a_run_without_a_usable_checkpoint_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Its checkpoints belong to another configuration (here: their hash is another): the folder keeps all it has."""
    monkeypatch.chdir(tmp_path)
    short = ["experiment=debug", "callbacks=none", "hydra.run.dir=run"]
    assert lit_glm_here("train", *short, "run.max_steps=5") == 0
    job = JobSpec.read(tmp_path / "run")
    longer = replace(job.config, run=replace(job.config.run, max_steps=10))
    replace(job, config=longer).write(tmp_path / "run")  # what a changed hash does to a folder
    result = tmp_path / "run" / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"interrupted"'))
    before = tree_digest(tmp_path / "run")
    assert lit_glm_here("train", *short, "run.max_steps=10", "run.resume=run") == 2
    assert "none of its 1 checkpoints can be used" in capfd.readouterr().err
    after, kept = tree_digest(tmp_path / "run"), set(before) - {".lock", "job.json", "devices.csv"}
    assert {name for name in kept if after.get(name) != before[name]} == set()
    assert len(rows(tmp_path / "run" / "steps.csv")) == 5
