"""The published checkpoint layout: names, shapes, loading rule, hostile and broken files."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CHECKPOINT, GOLDEN, lit_glm_here
from lit_glm.config.schema import ModelConfig
from lit_glm.errors import InputError
from lit_glm.model.checkpoint import load_checkpoint, read_weights, save_published, save_safetensors
from lit_glm.model.glm import GLM
from lit_glm.model.scoring import score_published
from parity.test_model import Z, golden_model, padded

STATS = json.loads((GOLDEN / "stats.json").read_text())
SHORT = GOLDEN / "blocklm-short-positions"
TINY = ModelConfig("test", 3, 64, 4, 160, 96, 0.0, 0.0)
POSITIONS = ("transformer.position_embeddings.weight", "transformer.block_position_embeddings.weight")


def golden_weights() -> Any:
    return read_weights(CHECKPOINT)


def test_glm_large_has_the_published_names_shapes_and_initialisation() -> None:
    torch.manual_seed(4096)
    state = GLM(ModelConfig("test", 24, 1024, 16, 30592, 512)).state_dict()
    assert list(state) == STATS["state_dict_order"]
    assert len(state) == 293
    assert sum(tensor.numel() for tensor in state.values()) == 334_688_256
    for name, expected in STATS["state_dict"].items():
        tensor = state[name]
        assert list(tensor.shape) == expected["shape"], name
        noise = 5 * max(expected["init_std"], 1e-12) / tensor.numel() ** 0.5
        assert abs(float(tensor.mean()) - expected["init_mean"]) <= 2 * noise, name
        if tensor.numel() > 1:
            assert float(tensor.std()) == pytest.approx(expected["init_std"], abs=noise), name


def test_short_position_tables_are_extended_by_the_published_rule() -> None:
    glm = GLM(TINY)
    fresh = {name: tensor.clone() for name, tensor in glm.state_dict().items()}
    said = load_checkpoint(glm, SHORT)
    assert len(said) == 2
    file = read_weights(SHORT)
    for name, tensor in glm.state_dict().items():
        rows = len(file[name])
        assert torch.equal(tensor[:rows], file[name].float()), name
        if name in POSITIONS:
            assert rows == 61
            assert torch.equal(tensor[rows:], fresh[name][rows:])
    scores = score_published(glm, padded("short.in"))
    np.testing.assert_allclose(scores.detach(), Z["short.tanh.logits"], atol=5e-5, rtol=0)


def _save(tmp_path: Path, weights: Any, **more: Any) -> Path:
    path = tmp_path / "weights.pt"
    torch.save({"module": weights, "iteration": 1, **more}, str(path))
    return path


def test_shorter_block_position_table_is_extended(tmp_path: Path) -> None:
    weights = golden_weights()
    weights[POSITIONS[1]] = weights[POSITIONS[1]][:40].clone()
    load_checkpoint(GLM(TINY), _save(tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("transformer.final_layernorm.bias"), "missing: transformer.final_layernorm.bias [64]"),
        (lambda w: w.update(extra=torch.zeros(3)), "unexpected: extra [3]"),
        (lambda w: w.update({POSITIONS[0]: torch.zeros(98, 64)}), "the file has [98, 64], the model [97, 64]"),
        (lambda w: w.update({POSITIONS[0]: torch.zeros(50, 32)}), "the file has [50, 32], the model [97, 64]"),
        (lambda w: (w.pop(POSITIONS[1]), w.update({POSITIONS[0]: torch.zeros(50, 64)})), "the file has [50, 64]"),
    ],
)
def test_mismatched_weights_error_gives_name_and_shape(change: Any, said: str, tmp_path: Path) -> None:
    weights = golden_weights()
    change(weights)
    with pytest.raises(InputError, match="does not fit") as raised:
        load_checkpoint(GLM(TINY), _save(tmp_path, weights))
    assert said in str(raised.value)


def test_checkpoint_with_published_rng_states_loads(tmp_path: Path) -> None:
    path = _save(
        tmp_path,
        golden_weights(),
        random_rng_state=random.getstate(),
        np_rng_state=np.random.get_state(),  # noqa: NPY002
        torch_rng_state=torch.get_rng_state(),
        rng_tracker_states={"model-parallel-rng": torch.get_rng_state()},
    )
    load_checkpoint(GLM(TINY), path)


class _MaliciousPickle:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def test_malicious_pickle_is_rejected_without_execution(tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    for path in (_save(tmp_path, golden_weights(), evil=_MaliciousPickle(mark)), tmp_path / "plain.pt"):
        if not path.exists():
            path.write_bytes(pickle.dumps({"module": _MaliciousPickle(mark)}))
        with pytest.raises(InputError, match=": (refused|is not a torch file)"):
            load_checkpoint(GLM(TINY), path)
        assert not mark.exists()


@pytest.mark.parametrize("kind", ["truncated", "text", "no module", "missing", "no tensor"])
def test_damaged_checkpoint_error_names_the_file(kind: str, tmp_path: Path) -> None:
    path = _save(tmp_path, golden_weights())
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "no module":
        torch.save({"model": {}}, str(path))
    elif kind == "no tensor":
        torch.save({"module": {"word_embeddings.weight": "words"}}, str(path))
    else:
        path.unlink()
    with pytest.raises(InputError, match=str(path)):
        load_checkpoint(GLM(TINY), path)


def test_checkpoint_folder_without_the_named_iteration_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(InputError, match="names '7'"):
        load_checkpoint(GLM(TINY), tmp_path)


def test_round_trips_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    weights = golden_model("tanh").state_dict()
    save_published(weights, tmp_path / "a.pt", 3)
    save_safetensors(weights, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        again = read_weights(tmp_path / name)
        assert sorted(again) == sorted(weights)
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_model_parallel_sets_are_merged(tmp_path: Path) -> None:
    """Split as THUDM's change_mp.py splits, then load the set by its first file."""
    weights = golden_weights()
    parts: Any = [{}, {}]
    for name, tensor in weights.items():
        if "query_key_value" in name:
            pieces = [torch.cat([block.chunk(2)[rank] for block in tensor.chunk(3)]) for rank in range(2)]
        elif "dense_h_to_4h" in name or name == "word_embeddings.weight":
            pieces = list(tensor.chunk(2))
        elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            pieces = list(tensor.chunk(2, dim=1))
        else:
            pieces = [tensor, tensor]
        for part, piece in zip(parts, pieces):
            part[name] = piece.clone()
    for rank, part in enumerate(parts):
        torch.save({"module": part}, str(tmp_path / f"mp_rank_{rank:02d}_model_states.pt"))
    merged = read_weights(tmp_path / "mp_rank_00_model_states.pt")
    assert all(torch.equal(merged[name], weights[name]) for name in weights)
    for rank in range(2):
        shutil.copy(tmp_path / f"mp_rank_{rank:02d}_model_states.pt", tmp_path / f"mp_rank_{rank:02d}_copy[1].pt")
    assert set(read_weights(tmp_path / "mp_rank_00_copy[1].pt")) == set(weights)
    other = {name: torch.zeros([size + 1 for size in tensor.shape]) for name, tensor in weights.items()}
    torch.save({"module": other}, str(tmp_path / "mp_rank_01_copy[1].pt"))
    with pytest.raises(InputError, match="of different models: word_embeddings.weight has the shapes"):
        read_weights(tmp_path / "mp_rank_00_copy[1].pt")
    (tmp_path / "mp_rank_00_model_states.pt").rename(tmp_path / "mp_rank_02_model_states.pt")
    with pytest.raises(InputError, match="mp_rank_00_model_states.pt is missing"):
        read_weights(tmp_path / "mp_rank_02_model_states.pt")


def test_train_rejects_invalid_checkpoint_without_traceback(tmp_path: Path, capfd: Any) -> None:
    from conftest import GOLDEN_RUN

    bad = tmp_path / "bad.pt"
    bad.write_text("x")
    arguments = [a for a in GOLDEN_RUN if "init_checkpoint" not in a]
    status = lit_glm_here("train", *arguments, f"model.init_checkpoint={bad}", f"hydra.run.dir={tmp_path / 'run'}")
    output = capfd.readouterr()
    assert status == 2
    assert str(bad) in output.err
    assert "Traceback" not in output.err
