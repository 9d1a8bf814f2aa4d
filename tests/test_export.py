"""What `export` refuses, and what it replaces; the written weights are compared in parity/ and runs_folder/."""

from pathlib import Path

import pytest
import torch

from lit_glm.errors import InputError
from lit_glm.export import export
from lit_glm.runs import checkpoints
from reporting.folders import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without checkpoints."""
    return make_run(tmp_path / "run")


@pytest.fixture
def run_with_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same; what is found in it is a checkpoint of two numbers after step 3, and a damaged one after it."""
    content = {"state_dict": {"glm.bias": torch.tensor([1.0, 2.0])}, "lit_glm": {"steps_done": 3}}
    found = (run / "checkpoints" / "step-00000003.ckpt", content, ["step-00000004.ckpt: skipped (cut short)"])
    monkeypatch.setattr(checkpoints, "latest_valid", lambda *_: found)
    return run


def test_a_folder_without_a_usable_checkpoint_is_rejected(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is not a run folder \(no job.json\)"):
        export(tmp_path / "nowhere", "safetensors", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="run: contains no usable checkpoint$"):
        export(run, "safetensors", tmp_path / "w.safetensors")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000003.ckpt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"run: contains no usable checkpoint\n.*step-00000003.ckpt: skipped"):
        export(run, "safetensors", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(("layout", "name"), [("safetensors", "w.safetensors"), ("published", "w.pt")])
def test_only_files_of_export_are_replaced(
    layout: str, name: str, run_with_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / name
    written = f"{out}: 1 tensors, 2 parameters, after step 3"
    assert [export(run_with_weights, layout, out) for _ in range(2)] == [written, written]
    assert "step-00000004.ckpt: skipped" in caplog.text
    out.write_bytes(b"dear")
    with pytest.raises(InputError, match="exists and was not written by export; give another file, or remove it"):
        export(run_with_weights, layout, out)
    assert out.read_bytes() == b"dear"
    with pytest.raises(InputError, match="--out /proc/nowhere/w: cannot be written"):
        export(run_with_weights, layout, Path("/proc/nowhere/w"))
