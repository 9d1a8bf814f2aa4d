"""The doctor finds what would end a long run, says what to do, and lets the other checks go on."""

import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import CHECKPOINT, EVAL_FILE, GOLDEN_RUN, TRAIN_FILE, lit_glm, lit_glm_here
from lit_glm import preflight
from lit_glm.check_result import CheckResult
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.doctor import run_check
from lit_glm.hardware.monitors import DeviceReading, Monitor
from lit_glm.hardware.runtimes.selection import SimulatedRuntime

Checks = Dict[str, Dict[str, str]]


def doctor(capfd: Any, *arguments: str) -> "tuple[int, Checks]":
    """Exit status and findings by name, in this process."""
    capfd.readouterr()
    status = lit_glm_here("doctor", *arguments, "--json")
    said = json.loads(capfd.readouterr().out)
    assert said["ok"] == (status == 0)
    return status, {entry["name"]: entry for entry in said["checks"]}


def failed(found: Checks) -> List[str]:
    return [name for name, entry in found.items() if entry["status"] == "fail"]


@pytest.fixture(autouse=True)
def _chdir_to_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_doctor_passes_with_two_ranks(tmp_path: Path) -> None:
    done = lit_glm("doctor", *GOLDEN_RUN, "topology=1x2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = "machine software runtime devices precision port collectives disk data.train_file data.eval_file".split()
    assert [line[6:].split(":")[0] for line in lines[:-2]] == [*names, "checkpoint", "published files", "memory"]
    assert "2 ranks over gloo: all-reduce, broadcast and all-gather correct" in done.stdout
    assert "37 examples, 231 candidates, at most 96 tokens" in done.stdout
    assert not list(tmp_path.iterdir())  # it leaves nothing


def test_doctor_rejects_an_invalid_configuration(capfd: Any) -> None:
    assert lit_glm_here("doctor", "bs=0") == 2
    assert "bs=0: must be at least 1" in capfd.readouterr().err


def test_a_missing_runtime(capfd: Any) -> None:
    status, found = doctor(capfd, *GOLDEN_RUN, "hardware=r300")
    assert (status, failed(found)) == (1, ["runtime"])
    assert "hardware.runtime=simulated" in found["runtime"]["advice"]
    assert found["collectives"]["status"] == "skip"
    assert found["data.eval_file"]["status"] == "ok"


def test_doctor_reports_simulated_runtime(capfd: Any) -> None:
    status, found = doctor(capfd, *GOLDEN_RUN, "hardware=r300", "hardware.runtime=simulated")
    assert status == 0
    assert "simulated" in found["runtime"]["message"]
    assert "32.0 GiB" in found["devices"]["message"]


def test_more_devices_than_there_are(capfd: Any) -> None:
    status, found = doctor(capfd, *GOLDEN_RUN, "topology=4x8", "bs=1")
    assert (status, failed(found)) == (1, ["devices"])
    assert found["port"]["message"] == "not checked: devices failed"


def test_a_busy_port(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate_config(compose_config("train", ["topology=1x1"]), TrainConfig)
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        status, found = doctor(capfd, *GOLDEN_RUN, "topology=1x2")
        alone = preflight.check_rendezvous_port(config, SimulatedRuntime(1, None))
    assert (status, failed(found)) == (1, ["port"])
    assert f"MASTER_PORT={port}: is in use on this machine" in found["port"]["message"]
    assert (alone.status, alone.advice) == ("warn", "a single device needs none")
    assert preflight.check_rendezvous_port(config, SimulatedRuntime(1, None)).status == "skip"


def test_doctor_reports_used_run_folder_and_too_large_global_batch(capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.csv").touch()
    status, found = doctor(capfd, "experiment=debug", "bs=100", "hydra.run.dir=run")
    assert (status, failed(found)) == (1, ["disk", "data.train_file"])
    assert "is not a run folder" in found["disk"]["message"]
    assert "data.synthetic.num_train=64: fewer than the 100 examples of a step" in found["data.train_file"]["message"]


def test_a_full_disk(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: real._replace(free=1000))
    status, found = doctor(capfd, *GOLDEN_RUN)
    assert (status, failed(found)) == (1, ["disk"])
    assert "hydra.run.dir=" in found["disk"]["advice"]


def test_a_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preflight.os, "fsync", no_space)
    config = validate_config(compose_config("doctor", ["model=glm_tiny"]), TrainConfig)
    found = preflight.check_disk(config, tmp_path)
    assert found.status == "fail"
    assert "No space left" in found.message


def test_a_broken_checkpoint(capfd: Any, tmp_path: Path) -> None:
    whole = next(CHECKPOINT.rglob("*.pt")).read_bytes()
    (tmp_path / "broken.pt").write_bytes(whole[: len(whole) // 2])
    status, found = doctor(capfd, *GOLDEN_RUN, f"model.init_checkpoint={tmp_path}/broken.pt")
    assert (status, failed(found)) == (1, ["checkpoint"])
    assert "truncated" in found["checkpoint"]["message"]


def test_a_checkpoint_of_another_shape(capfd: Any) -> None:
    status, found = doctor(capfd, *GOLDEN_RUN, "model.num_layers=2")
    assert (status, failed(found)) == (1, ["checkpoint"])
    assert "unexpected: transformer.layers.2" in found["checkpoint"]["advice"]


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_truncated_data_file(key: str, capfd: Any, tmp_path: Path) -> None:
    whole = (TRAIN_FILE if key == "train_file" else EVAL_FILE).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    status, found = doctor(capfd, *GOLDEN_RUN, f"data.{key}={tmp_path}/cut.hdf5")
    assert status == 1
    assert f"data.{key}" in failed(found)
    assert "cut short" in found[f"data.{key}"]["message"]
    assert found["checkpoint"]["status"] == "ok"


def test_data_that_the_model_cannot_take(capfd: Any) -> None:
    status, found = doctor(capfd, *GOLDEN_RUN, "model.init_checkpoint=null", "model.vocab_size=100")
    assert status == 1
    assert "beyond model.vocab_size=100" in found["data.train_file"]["message"]


def test_a_batch_beyond_the_memory(capfd: Any) -> None:
    large = [entry for entry in GOLDEN_RUN if not entry.startswith("model.")]
    chip = ["hardware=r300", "hardware.runtime=simulated", "hardware.memory_gib=4"]
    status, found = doctor(capfd, *large, *chip)
    assert (status, failed(found)) == (1, ["memory"])
    assert "no bs fits" in found["memory"]["advice"]


@pytest.mark.parametrize(
    ("power", "said"),
    [("120", "the device monitor raises TypeError"), (None, "the device monitor takes more than 0.05 s for a reading")],
)
def test_a_monitor_that_is_slow_or_returns_text(power: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def read(_devices: Any) -> List[DeviceReading]:
        if power is None:
            over.wait()
        return [DeviceReading(0, None, power, None, None, None)]

    monkeypatch.setattr(preflight, "monitor_for", lambda _: Monitor(read))
    monkeypatch.setattr(preflight, "_READING_S", 0.05 if power is None else 60.0)
    (problem,) = preflight._try_monitor(validate_config(compose_config("train", []), TrainConfig))
    over.set()
    assert said in problem


def test_a_monitor_that_reads_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate_config(compose_config("train", []), TrainConfig)
    for variable, problems in (("CUDA_VISIBLE_DEVICES", 1), (None, 0)):  # None: a CPU, which may have no counters
        monitor = Monitor(lambda _: [DeviceReading(0, 40.0, None, None, None, None)], variable)
        monkeypatch.setattr(preflight, "monitor_for", lambda _, monitor=monitor: monitor)
        assert len(preflight._try_monitor(config)) == problems


def test_doctor_uses_hardware_file_memory_if_device_reports_none(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedRuntime, "total_memory", lambda *_: None)
    large = [entry for entry in GOLDEN_RUN if not entry.startswith("model.")]
    chip = ["hardware=r300", "hardware.runtime=simulated", "hardware.memory_gib=4"]
    status, found = doctor(capfd, *large, *chip)
    assert (status, failed(found)) == (1, ["memory"])


def test_doctor_shows_words_if_the_vocabulary_is_known(capfd: Any) -> None:
    assert lit_glm_here("prepare", "data=synthetic", "data.synthetic.num_train=4", "data.synthetic.num_eval=2") == 0
    few = ["data.synthetic.num_train=4", "data.synthetic.num_eval=2"]
    _, found = doctor(capfd, "experiment=debug", *few)
    assert "[CLS]" in found["data.train_file"]["message"]
    assert "4 candidates:" in found["data.train_file"]["message"]


def test_versions_that_are_not_the_tested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_glm import preflight

    real = preflight.metadata.version
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "99.0" if name == "h5py" else real(name))
    found = preflight.check_packages()
    assert found.status == "warn"
    assert "h5py 99.0 (tested: " in found.message
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.1" if name == "h5py" else real(name))
    assert preflight.check_packages().status == "fail"


def test_exception_in_a_check_is_a_failed_check() -> None:
    def broken() -> CheckResult:
        raise KeyError("surprise")

    found = run_check("thing", broken)
    assert (found.status, found.message) == ("fail", "KeyError: 'surprise'")
