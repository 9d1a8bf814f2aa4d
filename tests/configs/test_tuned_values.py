"""The files of conf/fix_hp/ against the published table, and what is said where nothing was published."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm_here
from lit_glm.config.hydra_main import CONF_DIR, compose_config, load_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.config.tuned_values import nearest_pair_hint, search_key, topologies_with_fix_hp
from lit_glm.errors import InputError

MOST = 5553080
# FlagPerf training/VENDOR/glm-pytorch/config, commit 1b5a030: pair -> bs, max_samples, lr, seed
PUBLISHED = {
    "a100_1x1": (16, 24135, 1e-5, 10483),
    "a100_1x2": (8, MOST, 1e-5, 10483),
    "a100_1x4": (8, MOST, 1e-5, 10483),
    "a100_1x8": (8, MOST, 1e-5, 10483),
    "a100_2x8": (8, MOST, 1e-5, 10483),
    "bi_v100_1x1": (8, 24135, 1e-5, 10483),
    "bi_v100_1x8": (8, MOST, 1e-5, 10483),
    "bi_v100_2x8": (8, MOST, 1e-5, 10483),
    "k100_1x1": (16, 24135, 1e-5, 10483),
    "k100_1x8": (8, MOST, 1e-5, 10483),
    "c500_1x1": (16, 24135, 1e-5, 10483),
    "c500_1x8": (16, MOST, 1e-5, 10483),
    "c500_2x8": (16, MOST, 2e-5, 10483),
    "r300_1x1": (4, 4000, 1e-5, 4096),
    "r300_1x8": (5, MOST, 1e-5, 4096),
    "r300_2x8": (4, 20000, 1e-5, 4096),
}
COMMON = {
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip_grad": 1.0, "warmup": 0.1,
    "lr_decay_ratio": 0.1, "lr_decay_iters": 4338, "gradient_accumulation_steps": 1,
}  # fmt: skip


def composed(*overrides: str) -> Any:
    return validate_config(compose_config("train", list(overrides)), TrainConfig)


def test_fix_hp_files_match_the_published_pairs() -> None:
    assert {file.stem for file in (CONF_DIR / "fix_hp").glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("pair", PUBLISHED)
def test_fix_hp_file_matches_published_values(pair: str) -> None:
    hardware, _, topology = pair.rpartition("_")
    config = composed("experiment=flagperf", f"hardware={hardware}", f"topology={topology}")
    bs, most, lr, seed = PUBLISHED[pair]
    assert (config.bs, config.eval_bs, config.run.max_samples, config.lr, config.seed) == (bs, bs, most, lr, seed)
    assert config.fix_hp_source == pair
    assert {key: getattr(config.optimizer, key) for key in COMMON} == COMMON
    assert (config.scoring.name, config.precision.name, config.model.activation_checkpointing) == (
        "published", "fp32", True,
    )  # fmt: skip
    own = {"HSA_FORCE_FINE_GRAIN_PCIE": "1", "GPU_FLUSH_ON_EXECUTION": "1"} if hardware == "k100" else {}
    assert {key: value for key, value in config.hardware.env.items() if key in own or "HSA" in key} == own


def test_pair_without_fix_hp_values_uses_nearest_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    how = ["experiment=debug", "hardware=a100", "topology=4x8"]
    config = composed(*how)
    assert (config.fix_hp_source, config.bs) == ("none", 4)
    assert nearest_pair_hint("a100", 32) == " (nearest: a100_2x8; use fix_hp=a100_2x8)"
    asked = composed("hardware=a100", "topology=4x8", "fix_hp=a100_2x8")
    assert (asked.fix_hp_source, asked.bs) == ("a100_2x8", 8)
    assert nearest_pair_hint("h100", 1) == ""
    run = [f"hydra.run.dir={tmp_path}/run", "run.max_steps=1", "hardware.runtime=simulated", "data.num_workers=0"]
    assert lit_glm_here("train", "experiment=debug", "hardware=bi_v100", *run, "~fix_hp") == 0
    said = capsys.readouterr().out
    assert "fix_hp values: none published (nearest: bi_v100_1x1; use fix_hp=bi_v100_1x1)" in said


def test_fix_hp_lookup_matches_whole_hardware_names() -> None:
    assert set(topologies_with_fix_hp("bi_v100")) == {"1x1", "1x8", "2x8"}
    assert topologies_with_fix_hp("bi") == {}


def write_search(folder: Path, age_s: float, **changes: Any) -> Path:
    """A tune.json as `tune` leaves it for the debug configuration."""
    config: Any = compose_config("train", ["experiment=debug"])
    content = search_key(config)
    folder.mkdir(parents=True)
    file = folder / "tune.json"
    file.write_text(json.dumps({**content, "complete": True, **changes}))
    os.utime(file, (time.time() - age_s, time.time() - age_s))
    return folder


def test_bs_auto_separates_simulated_and_real_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_search(Path("outputs/tune/a/real"), 100.0, fastest_bs=8)
    write_search(Path("outputs/tune/a/simulated"), 50.0, fastest_bs=16, simulated=True)
    for more, bs in (([], 8), (["hardware.runtime=simulated"], 16)):
        config = validate_config(compose_config("train", ["experiment=debug", "bs=auto", *more]), TrainConfig)
        assert config.bs == bs


def test_composition_in_a_program_does_not_read_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the user's files comes from the composition; `sys.argv` belongs to another program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "-q", "--config-dir", "none"])
    (tmp_path / "own" / "fix_hp").mkdir(parents=True)
    (tmp_path / "own" / "fix_hp" / "mine.yaml").write_text("# @package _global_\nbs: 3\nfix_hp_source: mine\n")
    line = ["experiment=debug", "fix_hp=mine", "bs=auto", f"hydra.searchpath=[file://{tmp_path / 'own'}]"]
    assert load_config("train", line, TrainConfig).bs == 3
    with pytest.raises(InputError, match="bs=auto: no batch size is known"):
        load_config("train", ["experiment=debug", "bs=auto"], TrainConfig)


def test_auto_takes_the_newest_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_search(Path("outputs/tune/a/old"), 100.0, fastest_bs=8)
    new = write_search(Path("outputs/tune/a/new"), 50.0, fastest_bs=16)
    torn = write_search(Path("outputs/tune/a/torn"), 10.0, fastest_bs=32)
    (torn / "tune.json").write_text('{"fastest')
    config = validate_config(compose_config("train", ["experiment=debug", "bs=auto"]), TrainConfig)
    assert config.bs == 16
    assert f"bs=auto: 16, fastest in {new}" in capfd.readouterr().err
    write_search(Path("outputs/tune/a/sweep/0"), 5.0, fastest_bs=12)
    assert validate_config(compose_config("train", ["experiment=debug", "bs=auto"]), TrainConfig).bs == 12
    capfd.readouterr()
    part = write_search(Path("outputs/tune/a/part"), 1.0, fastest_bs=4, complete=False, largest_bs=8)
    assert validate_config(compose_config("train", ["experiment=debug", "bs=auto"]), TrainConfig).bs == 4
    said = capfd.readouterr().err
    assert "WARNING: fastest so far in an incomplete search" in said
    assert f"run.resume={part}" in said
