"""Every key can be swept: Hydra composes a sweep once without what is swept, then once for each combination."""

import sys
from pathlib import Path
from typing import Any, List

import pytest
from omegaconf import OmegaConf

from lit_glm.config.hydra_main import compose_config, run_command, validate_config
from lit_glm.config.schema import TrainConfig, iter_keys
from lit_glm.launch.sweep import SweepCallback

GROUPS = {"hardware": "cpu", "precision": "fp32", "scoring": "published", "topology": "1x2"}


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> List[TrainConfig]:
    """Configurations of the jobs of a sweep, none of which runs."""
    jobs: List[TrainConfig] = []

    def task(config: TrainConfig, _composed: Any) -> int:
        jobs.append(config)
        return 0

    monkeypatch.setattr(SweepCallback, "started", None)  # and None again after the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train", "-m", *arguments])
    assert run_command("train", TrainConfig, task) == 0
    return jobs


def override_text(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def test_every_key_can_be_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two values for the seed, and for each other key a sweep over the one value that it has."""
    composed = compose_config("train", ["experiment=debug"])
    keys = {
        key: value
        for key, value, _ in iter_keys(validate_config(composed, TrainConfig))
        if not isinstance(value, (dict, list, tuple)) and OmegaConf.select(composed, key) is not None
        if key != "seed" and not key.endswith(".name")  # which says which file of a group is taken
    }
    assert {"run.shutdown_timeout_s", "topology.devices_per_node", "data.synthetic.num_train", "bs"} <= set(keys)
    swept = [f"{key}=choice({override_text(value)})" for key, value in keys.items()]
    jobs = sweep(monkeypatch, tmp_path, "experiment=debug", "seed=1,2", *swept)
    assert [job.seed for job in jobs] == [1, 2]


def test_every_group_can_be_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swept = [f"{group}=choice({name})" for group, name in GROUPS.items()]
    assert len(sweep(monkeypatch, tmp_path, "experiment=debug,quickstart", *swept)) == 2


def test_sweep_with_custom_topology(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its published values are another pair's: each job is composed again, within Hydra."""
    jobs = sweep(monkeypatch, tmp_path, "experiment=debug", "topology.devices_per_node=2", "bs=4,8")
    assert [(job.bs, job.topology.name) for job in jobs] == [(4, "1x2"), (8, "1x2")]


def test_sweep_with_key_defined_only_by_swept_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = sweep(monkeypatch, tmp_path, "experiment=debug,quickstart", "data.synthetic.num_train=64")
    assert [job.data.synthetic.num_train for job in jobs if job.data.synthetic is not None] == [64, 64]
