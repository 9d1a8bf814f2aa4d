"""The command: what it leaves, that it goes on, and that `bs=auto` takes what it found."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm_here
from lit_glm.config.tuned_values import TUNE_FILE

TINY = ["hardware=cpu", "model=glm_tiny", "data=synthetic", "data.synthetic.num_train=6", "data.synthetic.num_eval=2"]


@pytest.mark.slow
def test_tune_writes_files_that_bs_auto_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "tune" / "day" / "time"
    how = [*TINY, "tune.steps=4", "tune.repeats=1"]
    assert lit_glm_here("tune", *how, "tune.max_minutes=0.001", f"hydra.run.dir={folder}") == 1
    assert "tune.max_minutes=0.001 is over" in capfd.readouterr().out
    # Once more, with more time: what is known is taken over.
    assert lit_glm_here("tune", *how, "tune.max_minutes=5", "run.resume=auto") == 0
    said = capfd.readouterr().out
    found = json.loads((folder / TUNE_FILE).read_text())
    assert found["complete"] is True
    assert [one["bs"] for one in found["trials"]][:2] == [1, 2]
    assert found["largest_bs"] == max(one["bs"] for one in found["trials"])  # all of them fit
    assert all(one["p_core"] > 0 and one["memory_gib"] > 0 for one in found["trials"])
    assert f"largest bs that fits: {found['largest_bs']}; fastest: {found['fastest_bs']}" in said
    pair = (folder / "cpu_1x1.yaml").read_text()
    assert pair.startswith("# @package _global_\n")
    assert f"\nbs: {found['fastest_bs']}\n" in pair
    assert "| p_core" in pair
    assert (folder / "tune.svg").read_text().startswith("<?xml")
    assert (folder / "tune.md").is_file()
    assert not list(folder.glob("tries/*/checkpoints"))
    run = ["bs=auto", "run.max_steps=1", "run.evaluate=false", "run.checkpoint_interval_steps=null"]
    assert lit_glm_here("train", *TINY, *run, f"hydra.run.dir={tmp_path}/run") == 0
    assert f"bs=auto: {found['fastest_bs']}, fastest in outputs/tune/day/time" in capfd.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["bs"], result["acc"], result["status"]) == (found["fastest_bs"], None, "finished")
    # Another configuration has no place in the same folder.
    assert lit_glm_here("tune", *how, "lr=1e-3", f"hydra.run.dir={folder}") == 2
    assert "contains a search of another configuration" in capfd.readouterr().err
    # The pair's file in a configuration of one's own serves as any other.
    (tmp_path / "own" / "fix_hp").mkdir(parents=True)
    (tmp_path / "own" / "fix_hp" / "cpu_1x1.yaml").write_text(pair)
    assert lit_glm_here("train", "--config-dir", "own", *TINY, "--cfg", "job") == 0
    assert f"\nbs: {found['fastest_bs']}\n" in "\n" + capfd.readouterr().out


def test_bs_auto_without_a_search_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", *TINY, "bs=auto") == 2
    assert "bs=auto: no batch size is known for cpu 1x1 fp32 shared_context glm_tiny" in capfd.readouterr().err
    how = ["hardware=r300", "topology=1x8", "bs=auto", "data.out_dir=none"]
    assert lit_glm_here("train", *how, "hardware.runtime=simulated") == 2
    assert "bs=auto: 5, from the fix_hp file of r300_1x8" in capfd.readouterr().err
