"""What people have instead of a checkpoint is named, with what to do; nothing advises to load it unsafely."""

import bz2
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from conftest import CHECKPOINT, lit_glm_here
from lit_glm.errors import InputError
from lit_glm.model.checkpoint import read_weights


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("blocklm-large-blank/200000/mp_rank_00_model_states.pt"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1340000000\n", "Git LFS pointer"),
        (lambda: b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (lambda: bz2.compress(b"x" * 100), "is a bzip2 archive: unpack it"),
        (lambda: gzip.compress(b"x" * 100), "is a gzip archive: unpack it"),
        (tar, "is a tar archive: unpack it"),
        (lambda: b"", "is empty"),
        (lambda: b'{"module": 1}', "is a JSON file"),
        (lambda: b"404: Not Found", "is a text"),
        (lambda: b"\x80\x02garbage", "is not a torch file"),
        (lambda: b"\x00" * 4096, "is not a torch file"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_described(content: Callable[[], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "blocklm-large-blank.pt"
    path.write_bytes(content())
    with pytest.raises(InputError, match=said) as raised:
        read_weights(path)
    text = str(raised.value)
    assert text.startswith(str(path))
    assert text.count("\n") < 2
    assert "weights_only" not in text


def test_damaged_safetensors_file_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="w.safetensors: is not a complete safetensors file"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["", "..", "../200000", "two words"])
def test_published_folder_that_names_no_folder_is_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(name)
    with pytest.raises(InputError, match=f"iteration.txt: names '{name}', which is not a folder name"):
        read_weights(tmp_path)


def test_model_parallel_set_without_a_tensor_is_rejected(tmp_path: Path) -> None:
    for number, names in enumerate((["a", "b"], ["a"])):
        weights = {name: torch.zeros(2) for name in names}
        torch.save({"module": weights}, str(tmp_path / f"mp_rank_{number:02d}_model_states.pt"))
    with pytest.raises(InputError, match="tensor b is missing from some of the model-parallel files"):
        read_weights(tmp_path)


def test_bare_state_dict_error_lists_a_few_names(tmp_path: Path) -> None:
    torch.save({f"layer.{number}.weight": torch.zeros(1) for number in range(293)}, str(tmp_path / "bare.pt"))
    with pytest.raises(InputError, match="layer.0.weight, .* and 285 more; these are weights") as raised:
        read_weights(tmp_path / "bare.pt")
    assert len(str(raised.value)) < 600


@pytest.mark.process
def test_evaluate_uses_the_configuration_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", "experiment=debug", "run.max_steps=2", "logger={}", "hydra.run.dir=run") == 0
    said = []
    for checkpoint in ("run", "run/checkpoints/step-00000002.ckpt"):
        capfd.readouterr()
        assert lit_glm_here("evaluate", f"model.init_checkpoint={checkpoint}", "hydra.run.dir=scores") == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1]
    assert "examples  16" in said[0]
    other = ["model.init_checkpoint=run", "model.hidden_size=32"]
    assert lit_glm_here("evaluate", *other, "hydra.run.dir=other") == 2
    assert "the file has [1024, 64], the model [1024, 32]" in capfd.readouterr().err
    # The model and data of a run with the weights of another file; the model of the command line would not fit.
    weights = "model.init_checkpoint=run/checkpoints/step-00000002.ckpt"
    assert lit_glm_here("train", "experiment=debug", "seed=9", "run.max_steps=1", "hydra.run.dir=second") == 0
    capfd.readouterr()
    assert lit_glm_here("evaluate", "second", weights, "hydra.run.dir=swapped") == 0
    swapped = json.loads(Path("swapped/evaluation.json").read_text())
    assert swapped["checkpoint"].endswith("run/checkpoints/step-00000002.ckpt")
    assert swapped["acc"] == json.loads(Path("scores/evaluation.json").read_text())["acc"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.jsonl").write_text("dear")
    assert lit_glm_here("evaluate", "model.init_checkpoint=run", "hydra.run.dir=mine") == 2
    assert (tmp_path / "mine" / "predictions.jsonl").read_text() == "dear"
    assert lit_glm_here("evaluate", "-m", "run", "scoring=published,shared_context", "hydra.run.dir=both") == 0
    for number, scoring in enumerate(("published", "shared_context")):
        assert json.loads(Path(f"both/{number}/evaluation.json").read_text())["scoring"] == scoring


def test_evaluate_of_what_is_no_run_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    weights = "model.init_checkpoint=sweep"
    for arguments, message in (
        (["/nowhere"], "/nowhere: no such file or folder to score"),
        (["sweep", "experiment=debug"], "model.init_checkpoint=sweep: contains no latest_checkpointed_iteration.txt"),
        (["sweep", weights], "sweep: is not a run folder (no job.json), whose model and data could be used"),
    ):
        assert lit_glm_here("evaluate", *arguments) == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_evaluate_uses_the_device_of_the_run_if_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    simulated = ["hardware=r300", "hardware.runtime=simulated"]
    assert lit_glm_here("train", "experiment=debug", *simulated, "run.max_steps=2", "hydra.run.dir=run") == 0
    assert lit_glm_here("evaluate", "run", "hydra.run.dir=same") == 0
    told = json.loads(Path("same/evaluation.json").read_text())
    assert (told["hardware"], told["simulated"]) == ("r300", True)
    assert lit_glm_here("evaluate", "run", "hardware=cpu", "hydra.run.dir=chosen") == 0
    job = json.loads(Path("run/job.json").read_text())
    job["config"]["hardware"]["runtime"] = "auto"
    Path("run/job.json").write_text(json.dumps(job))
    capfd.readouterr()
    assert lit_glm_here("evaluate", "run", "hydra.run.dir=other") == 0
    assert "device r300 of the run is unavailable (hardware=r300" in capfd.readouterr().err
    for folder in ("chosen", "other"):
        told = json.loads(Path(folder, "evaluation.json").read_text())
        assert (told["hardware"], told["simulated"]) == ("cpu", False)


def test_golden_checkpoint_is_readable() -> None:
    assert len(read_weights(CHECKPOINT)) > 20


def test_newest_valid_checkpoint_of_a_run_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    limits = ["run.max_steps=4", "run.checkpoint_interval_steps=2", "logger=none"]
    assert lit_glm_here("train", "experiment=debug", *limits, f"hydra.run.dir={run}") == 0
    old, new = (read_weights(run / "checkpoints" / f"step-0000000{step}.ckpt") for step in (2, 4))
    found = read_weights(run)
    assert all(torch.equal(found[name], new[name]) for name in new)
    assert not all(torch.equal(found[name], old[name]) for name in old)
    newest = run / "checkpoints" / "step-00000004.ckpt"
    content = newest.read_bytes()
    newest.write_bytes(content[:9000] + bytes(200) + content[9200:])
    found = read_weights(run)  # as a resumed run does
    assert all(torch.equal(found[name], old[name]) for name in old)


def test_weights_as_safetensors_are_recognised_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", "experiment=debug", "run.max_steps=1", "hydra.run.dir=run") == 0
    monkeypatch.setattr("sys.argv", ["export"])
    from lit_glm.export import main

    for _ in range(2):  # the second replaces what the first has written
        assert main(["run", "--to", "safetensors", "--out", "weights.bin"]) == 0
    assert set(read_weights(tmp_path / "weights.bin")) == set(read_weights(tmp_path / "run"))
