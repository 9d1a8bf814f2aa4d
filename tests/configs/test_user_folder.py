"""A folder of configuration of the user's own, and the published values of what runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conftest import lit_glm_here
from lit_glm.config.command_line import CommandLine, quote
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig

EXPERIMENT = """# @package _global_
defaults:
  - override /hardware: cpu
  - override /model: glm_tiny
  - override /data: synthetic
bs: 4
data: {synthetic: {num_train: 64, num_eval: 16}}
run: {max_steps: 2, checkpoint_interval_steps: 1}
logger: {}
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group in ("experiment", "hardware", "fix_hp"):
        (tmp_path / "own" / group).mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(EXPERIMENT)


@pytest.mark.process
@pytest.mark.parametrize("resume", ["'a=b/run'", "auto"])
def test_run_of_a_user_experiment_is_resumed(resume: str, tmp_path: Path, capfd: Any) -> None:
    mine = ["--config-dir", "own", "experiment=mine", "hydra.run.dir='a=b/run'"]
    assert lit_glm_here("train", *mine) == 0
    file = tmp_path / "a=b" / "run" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))
    assert lit_glm_here("train", *mine, f"run.resume={resume}") == 0, capfd.readouterr().err
    assert json.loads(file.read_text())["interruptions"] == 1


def test_yaml_error_in_a_user_file_is_reported_with_its_line(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "own" / "hardware" / "mine.yaml").write_text('name: mine\nsource: "a" b: c\n')
    assert lit_glm_here("train", "--config-dir", "own", "hardware=mine") == 2
    said = capfd.readouterr().err
    assert "own/hardware/mine.yaml, line 2, column 13" in said
    assert said.count("\n") == 1


def test_fix_hp_file_without_package_directive_is_rejected(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "own" / "fix_hp" / "cpu_1x1.yaml").write_text("bs: 2\n")
    assert lit_glm_here("train", "--config-dir", "own", "experiment=mine") == 2
    assert "fix_hp: the chosen file of this group sets top-level keys; add `# @package" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "pair", "bs"),
    [
        (["topology=1x8"], "r300_1x8", 5),
        (["topology.num_nodes=2", "topology.devices_per_node=8"], "r300_2x8", 4),
        (["topology.devices_per_node=8"], "r300_1x8", 5),
        (["topology.devices_per_node=8", "bs=3"], "r300_1x8", 3),
        (["topology.devices_per_node=3"], "none", 4),
        (["topology.devices_per_node=3", "fix_hp=r300_1x8"], "r300_1x8", 5),
    ],
)
def test_fix_hp_values_match_the_effective_topology(overrides: Any, pair: str, bs: int) -> None:
    config = validate_config(compose_config("train", ["hardware=r300", *overrides]), TrainConfig)
    assert (config.fix_hp_source, config.bs) == (pair, bs)


def test_cfg_job_prints_the_effective_config(capfd: Any) -> None:
    for place in (0, 2):
        arguments = ["hardware=r300", "topology.devices_per_node=8"]
        arguments[place:place] = ["--cfg", "job"]
        assert lit_glm_here("train", *arguments) == 0
        assert "fix_hp_source: r300_1x8" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flag", "said"), [("--experiment=debug", "write experiment=debug without the dashes"), ("--fast", "see --help")]
)
def test_a_flag_that_does_not_exist(flag: str, said: str, capfd: Any) -> None:
    assert lit_glm_here("train", flag) == 2
    assert said in capfd.readouterr().err


def test_glob_expands_to_all_files_of_a_group(tmp_path: Path) -> None:
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "mine.yaml").write_text("name: published\n")
    line = CommandLine(["scoring=glob(*)", "bs=4"], multirun=True, config_dir=str(tmp_path))
    names = [changes[0] for changes, _ in line.combinations()]
    assert names == ["scoring=mine", "scoring=published", "scoring=shared_context"]


def test_multirun_mode_in_a_config_file_is_rejected(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True, exist_ok=True)
    mode = "# @package _global_\ndefaults:\n  - debug\nhydra: {mode: MULTIRUN}\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(mode)
    assert lit_glm_here("train", "--config-dir", str(tmp_path / "own"), "experiment=mine") == 2
    assert "start a sweep with -m instead" in capfd.readouterr().err


def test_combinations_of_a_command_line() -> None:
    line = CommandLine.read(["-m", "bs=4,5", "model=glm_tiny", "lr=choice(1e-5,2e-5)", "data.train_file='a,b'"])
    assert line.multirun
    assert len(line.combinations()) == 4
    assert line.sample_combinations(lambda key: key == "bs")[1:] == [
        ["model=glm_tiny", "data.train_file='a,b'", "bs=5", "lr=1e-05"]
    ]


@pytest.mark.parametrize(
    ("content", "accelerator"),
    [
        ("runtimes: [cuda]", "mine"),  # not a CPU: memory is estimated and shared as on other devices
        ("runtimes: [cpu]", "cpu"),
        ("_target_: package.module.Chip", "mine"),
        ("runtimes: [cpu]\naccelerator: own", "own"),
    ],
)
def test_accelerator_defaults_to_hardware_name_unless_runtime_is_cpu(
    content: str, accelerator: str, tmp_path: Path
) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text(f"name: mine\n{content}\n")
    composed = compose_config("train", ["hardware=mine", f"hydra.searchpath=['file://{tmp_path}']"])
    assert validate_config(composed, TrainConfig).hardware.accelerator == accelerator


@given(st.text(alphabet="ab'\\\"$ {}=,[]#:", min_size=1))
def test_quoted_text_is_parsed_unchanged(text: str) -> None:
    value = OverridesParser.create().parse_override(f"key={quote(text)}").value()
    assert OmegaConf.create({"key": str(value)}).key == text
