"""Every logger once, for real: all get the same curves under the same names."""

import csv
import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict, Set

import pytest

from conftest import lit_glm, lit_glm_here

NAMES = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "perf/p_core",
    "perf/p_train",
    "perf/p_whole",
    "val/acc",
    "mem/gib",
}


def in_csv(run: Path) -> Set[str]:
    with (run / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name for row in rows for name, value in row.items() if value} - {"step", "epoch"}


def in_tensorboard(run: Path) -> Set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[-1].step == 10
    return set(events.Tags()["scalars"])


def in_mlflow(run: Path) -> Set[str]:
    places = [path for path in (run / "mlruns").rglob("metrics") if path.is_dir()]
    return {str(file.relative_to(place)) for place in places for file in place.rglob("*") if file.is_file()}


def in_wandb(run: Path) -> Set[str]:
    content = next((run / "wandb").rglob("run-*.wandb")).read_bytes()
    return {name for name in NAMES if name.encode() in content}


READERS: Dict[str, Callable[[Path], Set[str]]] = {
    "csv": in_csv,
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}


@pytest.fixture(scope="module")
def run_with_all_loggers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every logger whose package is here, all at once."""
    place = tmp_path_factory.mktemp("loggers")
    there = [name for name in sorted(READERS) if name == "csv" or importlib.util.find_spec(name) is not None]
    how = ["experiment=debug", f"logger=[{','.join(there)}]", "hydra.run.dir=run"]
    done = lit_glm("train", *how, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.mark.parametrize("logger", sorted(READERS))
def test_logger_receives_all_metrics(logger: str, run_with_all_loggers: Path) -> None:
    if logger != "csv":
        pytest.importorskip(logger)
    assert READERS[logger](run_with_all_loggers) >= NAMES


def test_logger_with_missing_package_is_rejected(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "pytorch_lightning.loggers.wandb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    assert lit_glm_here("train", "experiment=debug", "logger=wandb", f"hydra.run.dir={tmp_path}/run") == 2
    said = capfd.readouterr().err
    assert "logger.wandb: cannot be created" in said
    assert "pip install 'lit-glm[wandb]'" in said


@pytest.mark.process
@pytest.mark.parametrize(("group", "kind"), [("callbacks", "Callback"), ("logger", "loggers.Logger")])
def test_object_of_another_type_is_rejected(
    group: str, kind: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = [f"+{group}.mine._target_=types.SimpleNamespace", f"hydra.run.dir={tmp_path}/run"]
    assert lit_glm_here("train", "experiment=debug", *mine) == 2
    assert f"{group}.mine: SimpleNamespace is not a pytorch_lightning.{kind}" in capfd.readouterr().err


@pytest.mark.process
def test_callback_that_cannot_be_created_is_rejected(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = ["+callbacks.mine._target_=nowhere.Mine", f"hydra.run.dir={tmp_path}/run"]
    assert lit_glm_here("train", "experiment=debug", *mine) == 2
    said = capfd.readouterr().err
    assert "callbacks.mine: cannot be created (nowhere.Mine: ModuleNotFoundError: No module named 'nowhere')" in said
    assert "add its folder to PYTHONPATH" in said
    assert "pip install" not in said
    (tmp_path / "broken.py").write_text("class Mine:\n    def __init__(self):\n        self.missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ["+callbacks.mine._target_=broken.Mine", f"hydra.run.dir={tmp_path}/other"]
    assert lit_glm_here("train", "experiment=debug", *mine) == 2
    said = capfd.readouterr().err
    assert "(broken.Mine: AttributeError: 'Mine' object has no attribute 'missing'); arguments: none" in said
