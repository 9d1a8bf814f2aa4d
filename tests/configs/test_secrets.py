"""Secrets reach the run, and no file that people publish."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm, lit_glm_here
from lit_glm.config.secrets import MASK, find_secrets, mask_config, mask_override, restore_secrets

SECRET = "hf_verysecret"
DEBUG = ["experiment=debug", "run.max_steps=1", "run.evaluate=false"]


def test_what_is_masked_can_be_put_back() -> None:
    config = {
        "hardware": {"env": {"HF_TOKEN": SECRET, "BKCL_RING": "1"}},
        "logger": {"mlflow": {"tracking_uri": "https://me:word@host/x"}},
        "callbacks": {"mine": {"credentials": {"user": "me", "words": ["one", "two"]}}},
        "tokens_per_batch": "4",
    }
    masked = mask_config(config)
    assert masked["hardware"]["env"] == {"HF_TOKEN": MASK, "BKCL_RING": "1"}
    assert masked["logger"]["mlflow"]["tracking_uri"] == "https://...@host/x"
    secrets = find_secrets(config)
    assert len(secrets) == 5
    restore_secrets(masked, json.loads(json.dumps(secrets)))
    assert masked == config
    other = {"hardware": {"env": {}}, "callbacks": None}
    restore_secrets(other, secrets)
    assert other == {"hardware": {"env": {}}, "callbacks": None}
    assert mask_override("+hardware.env.HF_TOKEN=abc") == "+hardware.env.HF_TOKEN=..."


@pytest.mark.parametrize("how", [[], ["-m", "bs=2,4"], ["topology=1x2"]])
@pytest.mark.process
def test_no_file_of_a_run_holds_a_secret(how: Any, tmp_path: Path) -> None:
    done = lit_glm("train", *DEBUG, *how, f"+hardware.env.HF_TOKEN={SECRET}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    masked = [path.name for path in files if b"HF_TOKEN" in path.read_bytes()]
    assert {"job.json", "config.yaml", "overrides.yaml", "environment.json"} <= set(masked)
    run = next(path.parent for path in files if path.name == "job.json")
    resume = [] if "-m" in how else [f"run.resume={run}"]  # a sweep looks for its complete combinations by itself
    again = lit_glm("train", *DEBUG, *how, f"+hardware.env.HF_TOKEN={SECRET}", *resume, cwd=tmp_path)
    assert again.returncode == 0, again.stderr  # the same configuration, though its secret is not there to compare
    assert ("complete, reused from" if "-m" in how else "the run is complete; nothing to do") in again.stdout


@pytest.mark.process
def test_a_foreign_folder_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
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
