"""Raw text to arrays: prepare on the golden JSONL, and the golden HDF5 files through our reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import EVAL_FILE, GOLDEN, TRAIN_FILE, lit_glm_here
from lit_glm.data.cloze import WordPieceTokenizer
from lit_glm.data.collate import collate_padded
from lit_glm.data.h5sparse import SparseReader
from lit_glm.data.memmap_dataset import open_dataset

VOCAB = GOLDEN / "bert-large-uncased-vocab.txt"


@pytest.fixture(scope="module", params=[512, 96])
def prepared(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp(f"prepared{request.param}")
    arguments = [f"data.raw_dir={GOLDEN / 'record_jsonl'}", f"data.vocab_file={VOCAB}", f"data.out_dir={out}"]
    workers = "data.num_workers=2" if request.param == 96 else "data.num_workers=0"
    assert lit_glm_here("prepare", *arguments, f"data.max_seq_length={request.param}", workers) == 0
    return request.param, out


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_array_of_every_record(prepared: Any, split: str) -> None:
    length, out = prepared
    z = np.load(GOLDEN / f"record_samples_{split}{'' if length == 512 else '_tiny'}.npz")
    name = {"train": "train_hdf5/train_sparse.hdf5", "val": "eval_hdf5/eval_sparse.hdf5"}[split]
    with SparseReader(out / name, needs_answers=True) as reader:
        count = reader.num_candidates
        for key in ("text", "target", "logit_mask"):
            np.testing.assert_array_equal(reader.rows(key, 0, count), z[key], err_msg=key)
        np.testing.assert_array_equal(reader.rows("position", 0, 2 * count).reshape(z["position"].shape), z["position"])
        np.testing.assert_array_equal(reader.vector("mask"), z["mask"])
        np.testing.assert_array_equal(reader.pairs("choice_start_end"), z["choice_start_end"])
        ranges, answers = reader.pairs("answer_start_end"), reader.vector("answer_idx")
    golden = json.loads((GOLDEN / f"record_samples_{split}.json").read_text())
    assert [answers[a:b].tolist() for a, b in ranges] == [entry["answer_idx"] for entry in golden]


def test_names_of_the_evaluation_examples(prepared: Any) -> None:
    _, out = prepared
    golden = json.loads((GOLDEN / "record_samples_val.json").read_text())
    lines = (out / "eval_hdf5" / "eval_examples.jsonl").read_text(encoding="utf-8").split("\n")
    names = [json.loads(line) for line in lines if line]
    for name, expected in zip(names, golden):
        for key in ("idx", "guid", "candidates", "answers"):
            assert name[key] == expected[key]
    assert len(names) == len(golden)
    if prepared[0] == 512:
        assert [name["tokens_removed"] for name in names] == [entry["tokens_removed"] for entry in golden]


def test_h5sparse_reads_what_prepare_writes(prepared: Any) -> None:
    """The library that the published files were written with, as an oracle; it needs setuptools below 80."""
    h5sparse = pytest.importorskip("h5sparse", exc_type=ImportError)
    _, out = prepared
    path = out / "eval_hdf5" / "eval_sparse.hdf5"
    with h5sparse.File(str(path), "r") as file, SparseReader(path, needs_answers=True) as reader:
        for name, expected in (
            ("text", reader.rows("text", 0, reader.num_candidates)),
            ("position", reader.rows("position", 0, 2 * reader.num_candidates)),
            ("choice_start_end", reader.pairs("choice_start_end")),
        ):
            np.testing.assert_array_equal(file[name][()].toarray(), expected)


@pytest.mark.parametrize("scoring_batch", ["train", "eval"])
def test_the_golden_files_through_our_reader(scoring_batch: str) -> None:
    z = np.load(GOLDEN / "batch.npz")
    order = np.load(GOLDEN / "training.npz")["r1.indices"]
    split = open_dataset(*((TRAIN_FILE, False) if scoring_batch == "train" else (EVAL_FILE, True)), None)
    for number in range(2):
        indices = order[number] if scoring_batch == "train" else range(5 * number, 5 * number + 5)
        batch = collate_padded(split, [int(index) for index in indices], 96)
        golden = {
            key[len(f"{scoring_batch}.{number}.") :]: z[key]
            for key in z.files
            if key.startswith(f"{scoring_batch}.{number}.")
        }
        for key, ours in (
            ("text", batch.text),
            ("position", batch.position),
            ("mask", batch.separator),
            ("target", batch.target),
            ("logit_mask", batch.logit_mask),
            ("loss_mask", batch.loss_mask),
        ):
            np.testing.assert_array_equal(ours, golden[key], err_msg=key)
        if scoring_batch == "eval":
            assert batch.answers is not None
            assert [len(right) for right in batch.answers] == golden["answer_count"].tolist()
            assert [index for right in batch.answers for index in right] == golden["answer_idx"].tolist()


def test_tokenizer_on_every_golden_string() -> None:
    golden, pieces = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8")), WordPieceTokenizer(VOCAB)
    for entry in golden["strings"]:
        assert pieces.encode(entry["text"]) == entry["ids"], entry["text"]
    commands = {name: entry["id"] for name, entry in golden["command_tokens"].items()}
    ours = (pieces.cls, pieces.mask, pieces.eos, pieces.sop, pieces.eop)
    assert ours == tuple(commands[name] for name in ("ENC", "MASK", "eos", "sop", "eop"))
    assert pieces.size == golden["num_tokens"]


def test_prepare_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "val.jsonl").write_text("not json\n")
    status = lit_glm_here(
        "prepare", f"data.raw_dir={raw}", f"data.vocab_file={VOCAB}", f"data.out_dir={tmp_path / 'out'}"
    )
    assert status == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()  # a folder of the user's stays
    status = lit_glm_here(
        "prepare", f"data.raw_dir={raw}", f"data.vocab_file={VOCAB}", f"data.out_dir={tmp_path / 'mine'}"
    )
    assert (status, list((tmp_path / "mine").iterdir())) == (2, [])
