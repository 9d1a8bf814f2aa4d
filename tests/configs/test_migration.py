"""Names of version 0.1.0: an error with the new name on the command line, replaced in run folders."""

import json
import shutil
from pathlib import Path
from typing import Any, Dict

import pytest

from conftest import lit_glm_here, tree_digest
from lit_glm.config.key_aliases import REMOVED_KEYS, RENAMED, migrate_names
from lit_glm.config.schema import TrainConfig, iter_keys
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.selection import import_runtime_class
from lit_glm.plan import PlanConfig
from lit_glm.runs.environment import read_environment
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import read_result

OLD_RUN = Path(__file__).parent.parent / "cases" / "run_0_1_0"
"""A run folder that lit_glm 0.1.0 has written (fp16, interrupted); of its checkpoint only the weights are kept."""


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old"))


def test_every_new_key_exists() -> None:
    keys = {key for key, _, _ in iter_keys(PlanConfig())}
    assert set(RENAMED["config"].values()) <= keys
    assert not (set(RENAMED["config"]) | set(REMOVED_KEYS)) & keys


@pytest.mark.parametrize("old", [*RENAMED["config"], *REMOVED_KEYS])
@pytest.mark.parametrize("before", ["", "+", "++"])
def test_an_old_key_on_the_command_line(old: str, before: str, capfd: Any) -> None:
    command = "plan" if old.startswith("plan.") else "train"
    assert lit_glm_here(command, f"{before}{old}=1") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert RENAMED["config"].get(old, "leave the key out") in error
    assert "0.2.0" in error


@pytest.mark.parametrize("group", ["hardware", "fix_hp"])
def test_old_key_in_a_user_config_file_is_rejected_with_the_new_key(group: str, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "own" / group
    folder.mkdir(parents=True)
    if group == "hardware":
        (folder / "mine.yaml").write_text("defaults: [cpu]\nname: mine\ncard: MINE\ndetect: MINE\n")
        chosen, wanted = "hardware=mine", ["hardware.product_name", "hardware.device_name_pattern"]
    else:
        (folder / "mine.yaml").write_text("# @package _global_\ntuned_for: mine\nbs: 2\n")
        chosen, wanted = "fix_hp=mine", ["fix_hp_source"]
    assert lit_glm_here("train", "--config-dir", str(tmp_path / "own"), chosen) == 2
    error = capfd.readouterr().err
    assert [name in error for name in wanted] == [True] * len(wanted)
    assert str(folder / "mine.yaml") in error
    assert "Traceback" not in error


def test_report_names_the_new_key(old_run: Path, capfd: Any) -> None:
    from lit_glm.report import main

    assert main([str(old_run), "report.card=R300"]) == 2
    assert "write report.device_name=R300" in capfd.readouterr().err


def test_files_of_an_old_run_have_new_names(old_run: Path) -> None:
    result, environment = read_result(old_run), read_environment(old_run)
    assert result is not None
    stored: Dict[str, Any] = json.loads((old_run / "result.json").read_text())
    assert result["fix_hp_source"] == stored["tuned_for"]
    assert result["external_cpu_load"] == stored["others_load"]
    assert not set(RENAMED["result.json"]) & set(result)
    assert environment["device_name"]
    assert isinstance(environment["devices"], list)
    job = JobSpec.read(old_run)
    assert isinstance(job.config, TrainConfig)
    assert job.config.optimizer.gradient_accumulation_steps == 1
    assert job.start_time > 0


def test_migration_renames_nested_keys() -> None:
    old = {"warm_up": {"steps": 2, "seconds": 1.5, "slower": 3.0}, "others_load": None}
    new = {"first_steps": {"count": 2, "seconds": 1.5, "slowdown": 3.0}, "external_cpu_load": None}
    assert migrate_names(old, "result.json") == new
    assert migrate_names(new, "result.json") == new
    assert old["warm_up"] == {"steps": 2, "seconds": 1.5, "slower": 3.0}


def test_resuming_an_old_run_is_rejected_without_changes(
    old_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(old_run.parent)
    before = tree_digest(old_run)
    assert lit_glm_here("train", "experiment=debug", f"run.resume={old_run}") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "0.1.0" in error
    assert "0.2.0" in error
    assert tree_digest(old_run) == before


def test_report_compare_and_export_read_an_old_run(old_run: Path, tmp_path: Path, capfd: Any) -> None:
    from lit_glm.export import main as export
    from lit_glm.report import main as report

    before = tree_digest(old_run)
    assert report([str(old_run)]) == 0
    assert "| fp16 " in capfd.readouterr().out
    assert report(["--compare", str(old_run), str(old_run)]) == 0
    assert "No difference." in capfd.readouterr().out
    assert export([str(old_run), "--to", "published", "--out", str(tmp_path / "weights.pt")]) == 0
    assert "after step 5" in capfd.readouterr().out
    assert tree_digest(old_run) == before


@pytest.mark.slow
def test_evaluate_and_plan_read_an_old_run(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree_digest(old_run)
    assert lit_glm_here("evaluate", str(old_run)) == 0
    assert "acc  31.25%" in capfd.readouterr().out
    same = ["hardware=cpu", "precision=fp16", "scoring=published", "model=glm_tiny", "data=synthetic"]
    data = ["data.synthetic.num_train=64", "data.synthetic.num_eval=16", "bs=8"]
    assert lit_glm_here("plan", *same, *data, f"plan.runs={old_run}", "plan.device_counts=[1]") == 0
    assert "1 run on cpu" in capfd.readouterr().out
    assert tree_digest(old_run) == before


def test_runtime_with_old_method_names_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_runtime.py").write_text(
        "from lit_glm.hardware.runtimes.base import Runtime\n"
        "class Old(Runtime):\n    @staticmethod\n    def missing():\n        return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="missing -> unavailable_reason"):
        import_runtime_class("old_runtime.Old")
