"""Secrets reach the run, and no file that people publish."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm, lit_glm_here
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.config.secrets import MASK, mask_override
from lit_glm.runs.job_spec import JobSpec

SECRET = "hf_verysecret"
DEBUG = ["experiment=debug", "run.max_steps=1", "run.evaluate=false"]


def test_masked_secrets_are_restored_in_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = validate_config(compose_config("train", ["experiment=debug"]), TrainConfig)
    assert JobSpec(plain, 0.0, []).secrets_variable() == {}
    secret = replace(plain, hardware=replace(plain.hardware, env={"HF_TOKEN": SECRET, "BKCL_RING": "1"}))
    secret.logger = {"mlflow": {"_target_": "a.B", "tracking_uri": "https://me:word@host/x"}}
    secret.callbacks = {"mine": {"_target_": "a.B", "credentials": {"user": "me", "words": ["one", "two"]}}}
    job = JobSpec(secret, 0.0, [])
    job.write(tmp_path)
    masked = JobSpec.read(tmp_path).config
    assert masked.hardware.env == {"HF_TOKEN": MASK, "BKCL_RING": "1"}
    assert masked.logger["mlflow"]["tracking_uri"] == "https://...@host/x"
    assert masked.callbacks["mine"]["credentials"] == {"user": MASK, "words": [MASK, MASK]}
    for name, value in job.secrets_variable().items():
        monkeypatch.setenv(name, value)
    assert JobSpec.read(tmp_path).config == secret
    assert mask_override("+hardware.env.HF_TOKEN=abc") == "+hardware.env.HF_TOKEN=..."


@pytest.mark.parametrize(
    "how",
    [[], *(pytest.param(how, marks=pytest.mark.slow) for how in (["-m", "bs=2,4"], ["topology=1x2"]))],
)
@pytest.mark.process
def test_no_file_of_a_run_holds_a_secret(how: Any, tmp_path: Path) -> None:
    done = lit_glm("train", *DEBUG, *how, f"+hardware.env.HF_TOKEN={SECRET}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    masked = [path.name for path in files if b"HF_TOKEN" in path.read_bytes()]
    assert {"job.json", "config.yaml", "overrides.yaml", "environment.json"} <= set(masked)
    run = next(path.parent for path in files if path.name == "job.json")
    resume = [] if "-m" in how else [f"run.resume={run}"]  # a sweep looks for its complete combinations by itself
    again = lit_glm("train", *DEBUG, *how, f"+hardware.env.HF_TOKEN={SECRET}", *resume, cwd=tmp_path)
    assert SECRET not in again.stdout + again.stderr
    assert again.returncode == 0, again.stderr  # the same configuration, though its secret is not there to compare
    assert ("complete, reused from" if "-m" in how else "the run is complete; nothing to do") in again.stdout


@pytest.mark.process
def test_run_folder_content_is_neither_resolved_nor_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPORTERS_SECRET", SECRET)
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run") == 0
    job = json.loads(Path("run/job.json").read_text())
    job["config"]["report"]["machine"] = "${oc.env:REPORTERS_SECRET}"
    job["config"]["model"]["name"] = "${oc.env:REPORTERS_SECRET}"
    job["config"]["hardware"]["_target_"] = "antigravity.Runtime"
    job["config"]["hardware"]["env"] = {"INJECTED": "yes"}
    Path("run/job.json").write_text(json.dumps(job))
    capfd.readouterr()
    for command in (["report", "run"], ["evaluate", "run", "hydra.run.dir=scores"]):
        assert lit_glm_here(*command) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "INJECTED" not in os.environ
    Path("run/job.json").unlink()
    Path("run/.hydra/config.yaml").write_text("model: {name: '${oc.env:REPORTERS_SECRET}'}\nseed: 1\n")
    assert lit_glm_here("report", "run") == 0
    assert SECRET not in capfd.readouterr().out
