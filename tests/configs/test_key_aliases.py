"""Words that people bring from other tools lead to the right key; help has the comments of conf/."""

import re
import sys
from pathlib import Path
from typing import Any, List

import pytest

from conftest import lit_glm_here
from lit_glm.config.hydra_main import CONF_DIR, compose_config, validate_config
from lit_glm.config.key_aliases import _KEYS
from lit_glm.config.schema import TrainConfig, iter_keys


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("learning_rate=1e-4", "write lr=1e-4"),
        ("batch_size=8", "write bs=8"),
        ("epochs=3", "write run.max_samples=N"),
        ("gpus=8", "write topology=1x8"),
        ("nodes=2", "write topology=2x8"),
        ("fp32=true", "write precision=fp32"),
        ("bf16=1", "write precision=bf16"),
        ("tf32=true", "write precision=fp32 precision.tf32=true"),
        ("--experiment=quickstart", "write experiment=quickstart without the dashes"),
        ("quickstart", "did you mean experiment=quickstart?"),
        ("bs=4,5", "several values need a sweep (-m): train -m bs=4,5"),
        ("logger=csv,tensorboard", "all of them in one run: logger=[csv,tensorboard]"),
        ("logger=null", "logger=null: choose one of csv, mlflow, none"),
        ("--learning_rate=1e-5", "write lr=1e-5"),
        ("mixed_precision=bf16", "write precision=bf16"),
        ("warmup_steps=100", "optimizer.warmup=SHARE"),
        ("eval_steps=500", "run.eval_interval_samples=N (samples, not steps"),
        ("optimizer.wd=0.1", "write optimizer.weight_decay=0.1"),
    ],
)
def test_key_alias_of_another_tool_suggests_the_key(typed: str, said: str, capfd: Any) -> None:
    assert lit_glm_here("train", typed) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_nested_keys_are_not_treated_as_aliases() -> None:
    how = ["hardware=cpu", "hardware.peak_tflops.fp32=1.5", "precision=amp", "precision.loss_scale.window=7"]
    assert lit_glm_here("train", *how, "--cfg", "job") == 0


def test_all_invalid_overrides_are_reported_together(capfd: Any) -> None:
    assert lit_glm_here("train", "learning_rate=1e-4", "lr", "=", "gpus=2") == 2
    assert capfd.readouterr().err.count("\n") == 3


def test_key_aliases_are_unique_and_refer_to_existing_keys() -> None:
    keys = {key for key, _, _ in iter_keys(TrainConfig())}
    groups = {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}
    assert {key for key in _KEYS if not key.startswith("hydra.")} <= keys | groups
    words = [word for words in _KEYS.values() for word in words.split(", ")]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("loggers", ["none", "[csv,tensorboard]", "csv"])
def test_any_number_of_loggers_can_be_selected(loggers: str) -> None:
    config = validate_config(compose_config("train", [f"logger={loggers}"]), TrainConfig)
    assert set(config.logger) == set(re.findall(r"\w+", loggers)) - {"none"}


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate", "doctor", "verify", "plan", "tune"])
def test_help_has_the_comments_of_the_keys(command: str, capfd: Any) -> None:
    assert lit_glm_here(command, "--help", *(["hardware=r300"] if command == "tune" else [])) == 0
    text = capfd.readouterr().out.partition("== What the keys mean ==")[2]
    assert ("# conf/hardware/r300.yaml" in text) == (command == "tune")
    assert "# tokens of context and candidate together" in text
    assert ("# seconds between readings of the device monitor" in text) == (command != "prepare")
    assert ("# time limit of the search" in text) == (command == "tune")
    assert "defaults:" not in text


def test_help_lists_choices_and_key_comments(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    assert lit_glm_here("train", "--help") == 0
    shown = capfd.readouterr().out
    assert "== What can be chosen" in shown
    assert "# training stops at the first evaluation that reaches it" in shown


@pytest.mark.process
@pytest.mark.parametrize(
    "command", ["train", "prepare", "evaluate", "export", "report", "doctor", "verify", "plan", "tune"]
)
def test_help_begins_with_what_the_command_does_and_an_example(command: str, capfd: Any) -> None:
    try:
        status: Any = lit_glm_here(command, "--help")
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 0
    first, empty, example = capfd.readouterr().out.splitlines()[:3]
    assert first.endswith((".", ":"))
    assert empty == ""
    assert example.startswith(f"  python -m lit_glm.{command} ")


def test_help_lists_user_config_groups_and_accepts_value_lists(capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "hardware" / "lab").mkdir(parents=True)
    (tmp_path / "hardware" / "abacus.yaml").write_text("name: abacus\n")
    (tmp_path / "hardware" / "lab" / "rack.yaml").write_text("name: rack\n")
    assert lit_glm_here("plan", "--config-dir", str(tmp_path), "-h", "bs=4,8") == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("hardware: a100, abacus, ") for line in lines)
    assert "hardware/lab: rack" in lines
    assert "bs: 4" in lines


@pytest.mark.parametrize(("flags", "shown"), [([], "bs: ${bs}"), (["--resolve"], "bs: 7")])
def test_help_resolves_interpolations_on_request(flags: List[str], shown: str, capfd: Any) -> None:
    assert lit_glm_here("train", "--help", *flags, "bs=7", "eval_bs=${bs}") == 0
    assert f"eval_{shown}" in capfd.readouterr().out.splitlines()
