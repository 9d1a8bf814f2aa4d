"""Chips without the chip: a rehearsal gives the processor's numbers and says so; a missing runtime is said."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conftest import GOLDEN_RUN, lit_glm, lit_glm_here
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import HardwareConfig, TopologyConfig, TrainConfig
from lit_glm.errors import InputError
from lit_glm.hardware.env import set_hardware_env
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.hardware.runtimes.selection import make_runtime, validate_devices
from parity.test_training import check_trajectory

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_golden_steps_on_two_simulated_devices(tmp_path: Path) -> None:
    run = tmp_path / "run"
    chip = ["hardware=r300", "hardware.runtime=simulated", "topology=1x2", "scoring=published"]
    done = lit_glm("train", *chip, *GOLDEN_RUN, f"hydra.run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_trajectory(run, "erf", 2)
    result = json.loads((run / "result.json").read_text())
    assert (result["simulated"], result["runtime"], result["mem_total_gib"]) == (True, "simulated", 32.0)
    assert "SIMULATED" in done.stdout
    assert "r300 1x2 (simulated" in done.stdout
    environment = json.loads((run / "environment.json").read_text())
    assert environment["variables"]["BKCL_PCIE_RING"] == "1"
    assert environment["devices"] == ["simulated", "simulated"]


def test_missing_runtime_error_gives_alternatives(tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *GOLDEN_RUN, "hardware=r300", f"hydra.run.dir={tmp_path}") == 2
    said = capfd.readouterr().err
    assert "torch_xmlir is not installed" in said
    assert "Install it: the vendor's wheels, pip install" in said
    assert "hardware.runtime=simulated" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "hardware.runtimes=[abacus]",
            "hardware.runtimes=[abacus] (conf/hardware/r300.yaml): must be one or more of cpu, cuda",
        ),
        ("hardware.runtimes=[]", "hardware.runtimes=[] (conf/hardware/r300.yaml): must be one or more of"),
        ("hardware.runtimes=[cpu]", "would report measurements of the CPU as those of"),
    ],
)
def test_invalid_hardware_runtimes_list_is_rejected(override: str, said: str, tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *GOLDEN_RUN, "hardware=r300", override, f"hydra.run.dir={tmp_path}/run") == 2
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_more_devices_than_there_are(tmp_path: Path) -> None:
    more = CPURuntime().device_count() + 1
    done = lit_glm("train", *GOLDEN_RUN, f"topology.devices_per_node={more}", "bs=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count(f"topology=1x{more} needs {more} devices per node") == 1
    assert "Traceback" not in done.stderr


def test_hardware_env_does_not_replace_user_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_GLM_A", "mine")
    monkeypatch.delenv("LIT_GLM_B", raising=False)
    said = set_hardware_env(HardwareConfig(name="chip", env={"LIT_GLM_A": "theirs", "LIT_GLM_B": "theirs"}))
    assert (os.environ["LIT_GLM_A"], os.environ.pop("LIT_GLM_B")) == ("mine", "theirs")
    assert len(said) == 1
    assert "keeping LIT_GLM_A=mine (environment)" in said[0]


ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_user_allocator_variable_is_kept_under_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    said = set_hardware_env(HardwareConfig(name="chip", env=ALLOCATOR))
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert len(said) == 1
    assert "keeping PYTORCH_ALLOC_CONF=max_split_size_mb:64 (environment)" in said[0]
    assert said[0].endswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")


@pytest.mark.parametrize(("version", "known"), [("1.12.1+cu113", False), ("2.0.1", False), ("2.1.0", True)])
def test_an_option_that_an_older_torch_refuses_is_left_out(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that the variable is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    said = set_hardware_env(HardwareConfig(name="chip", env=ALLOCATOR))
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == ("expandable_segments:True" if known else None)
    assert said == (
        []
        if known
        else [
            "leaving out PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (--config-dir: hardware/chip.yaml): it needs "
            "torch 2.1 or later"
        ]
    )


@pytest.mark.parametrize("runtime", ["cpu", "cuda"])
def test_runtime_not_listed_in_the_hardware_file_is_rejected(runtime: str, tmp_path: Path, capfd: Any) -> None:
    chip = ["hardware=r300", f"hardware.runtime={runtime}"]
    assert lit_glm_here("train", *GOLDEN_RUN, *chip, f"hydra.run.dir={tmp_path}/run") == 2
    assert f"hardware.runtime={runtime}: hardware=r300 runs on xmlir, xpytorch" in capfd.readouterr().err


def test_simulated_device_index_out_of_range_is_rejected() -> None:
    runtime = make_runtime(HardwareConfig(runtime="simulated", memory_gib=32.0), TopologyConfig(1, 2))
    assert (runtime.device_count(), runtime.total_memory(0)) == (2, 32 * 2**30)
    with pytest.raises(InputError, match="device 2 does not exist"):
        runtime.device(2)


def test_new_hardware_needs_only_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """docs/hardware.md: copy a file, change it, run; here in a copy of the checkout."""
    import shutil

    shutil.copytree(str(ROOT / "conf"), str(tmp_path / "conf"))
    shutil.copytree(str(ROOT / "src"), str(tmp_path / "src"))
    chip = (ROOT / "conf" / "hardware" / "cpu.yaml").read_text()
    chip = chip.replace("name: cpu", "name: newchip").replace("env: {}", "env: {NEWCHIP_RING: '1'}")
    (tmp_path / "conf" / "hardware" / "newchip.yaml").write_text(chip)
    run = tmp_path / "run"
    done = lit_glm(
        "train",
        *GOLDEN_RUN,
        "hardware=newchip",
        "run.max_steps=2",
        f"hydra.run.dir={run}",
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "src")},
        cold=True,
    )
    assert done.returncode == 0, done.stderr
    assert "newchip 1x1" in done.stdout
    assert json.loads((run / "environment.json").read_text())["variables"]["NEWCHIP_RING"] == "1"


class _FakeDevice(CPURuntime):
    """A double of a card that calls itself what a test wants."""

    def device_name(self, index: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def total_memory(self, index: int) -> float:
        return 79.1 * 2**30


def test_device_name_and_memory_are_checked_against_the_hardware_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "conf" / "hardware"
    wrong = HardwareConfig(name="a100", device_name_pattern="A100", memory_gib=40.0)
    with pytest.raises(InputError, match="'NVIDIA H100 80GB HBM3'; use hardware=h100"):
        validate_devices(wrong, _FakeDevice(), 1, folder)
    assert (
        validate_devices(
            HardwareConfig(name="h100", device_name_pattern="H100", memory_gib=80.0), _FakeDevice(), 1, folder
        )
        == []
    )
    hints = validate_devices(HardwareConfig(name="cuda"), _FakeDevice(), 1, folder)
    assert "hardware=h100 has its peak" in hints[0]
    with pytest.raises(InputError, match="hardware=c500, but device 0 is 'NVIDIA H100"):
        validate_devices(HardwareConfig(name="c500", product_name="C500"), _FakeDevice(), 1, folder)
    monkeypatch.setattr(_FakeDevice, "device_name", lambda self, index: "NVIDIA GeForce RTX 4090")
    with pytest.raises(InputError, match="hardware=c500, but device 0 .* RTX 4090'; use the file of that device"):
        validate_devices(HardwareConfig(name="c500", product_name="C500", vendor="MetaX"), _FakeDevice(), 1, folder)
    monkeypatch.undo()
    monkeypatch.setattr(_FakeDevice, "device_name", lambda self, index: "NVIDIA H200 NVL")
    with pytest.raises(InputError, match="'NVIDIA H200 NVL'; use hardware=cuda"):
        validate_devices(HardwareConfig(name="h200", device_name_pattern="NVIDIA H200$"), _FakeDevice(), 1, folder)
    monkeypatch.setattr(_FakeDevice, "device_name", lambda self, index: "KUNLUN P800")
    hints = validate_devices(
        HardwareConfig(name="r300", product_name="R300", vendor="Kunlunxin"), _FakeDevice(), 1, folder
    )
    assert hints == ["device 0 is 'KUNLUN P800'; hardware=r300 has the specification of R300"]
    monkeypatch.undo()
    other = validate_devices(
        HardwareConfig(name="h100", device_name_pattern="H100", memory_gib=40.0), _FakeDevice(), 1, folder
    )
    assert "device 0 has 79.1 GiB" in other[0]


def test_mig_slice_is_rejected_under_a_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "conf" / "hardware"
    monkeypatch.setattr(_FakeDevice, "device_name", lambda *_: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    monkeypatch.setattr(_FakeDevice, "total_memory", lambda *_: 9.75 * 2**30)
    h100 = validate_config(compose_config("train", ["hardware=h100"]), TrainConfig).hardware
    with pytest.raises(InputError, match="device 0 is a MIG slice.*use hardware=cuda"):
        validate_devices(h100, _FakeDevice(), 1, folder)
    assert validate_devices(HardwareConfig(name="cuda"), _FakeDevice(), 1, folder) == []
    assert (
        len(
            validate_devices(
                HardwareConfig(name="mine", vendor="NVIDIA", product_name="My slice"), _FakeDevice(), 1, folder
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    ("file", "name", "fits"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("h100", "NVIDIA H100 PCIe", False),
        ("h200", "NVIDIA H200", True),
        ("h200", "NVIDIA H200 NVL", False),
        ("a100", "NVIDIA A100-SXM4-40GB", True),
        ("a100", "NVIDIA A100-PCIE-40GB", True),
        ("a100", "NVIDIA A100 80GB PCIe", True),
        ("a100", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", False),
        ("a100", "NVIDIA A100X", False),
    ],
)
def test_device_name_patterns_match_whole_names(file: str, name: str, fits: bool) -> None:
    pattern = str(OmegaConf.load(ROOT / "conf" / "hardware" / f"{file}.yaml").device_name_pattern)
    assert (re.search(pattern, name) is not None) == fits


def test_invalid_device_name_pattern_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndevice_name_pattern: C500 (64G\n")
    with pytest.raises(InputError, match="mine.yaml: device_name_pattern=C500 .64G: not a regular expression"):
        validate_devices(HardwareConfig(name="cuda"), _FakeDevice(), 1, tmp_path)


def test_vendor_names_occur_only_in_the_hardware_package() -> None:
    names = "kunlunxin|xmlir|xpytorch|iluvatar|metax|hygon|nvidia|cuda|nvml|nccl|xccl|bkcl|xacc|xpu"
    names += "|r300|a100|h[12]00|bi_v100|k100|c500"
    found = subprocess.run(
        ["grep", "-rliE", names, "--exclude=*.pyc", str(ROOT / "src" / "lit_glm")],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    outside = {str(Path(path).relative_to(ROOT / "src" / "lit_glm")) for path in found}
    assert all(path.startswith("hardware/") for path in outside), outside
