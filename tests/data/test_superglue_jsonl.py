"""Lines that cannot be used are counted by reason, with their numbers, and left out."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import psutil
import pytest

from conftest import GOLDEN, lit_glm_here
from lit_glm.data import h5sparse
from lit_glm.data.h5sparse import SparseReader
from lit_glm.data.prepare_hdf5 import _encode_in_parallel, prepare_file
from lit_glm.data.superglue_jsonl import SkippedRecords, read_questions
from lit_glm.errors import InputError, RunError

VOCAB = GOLDEN / "bert-large-uncased-vocab.txt"


def write(folder: Path, lines: List[str]) -> Path:
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "x.jsonl"


def record(query: str = "Then @placeholder left.", answers: Any = ("Ann",), text: str = "Ann met Bob.") -> str:
    spans = [{"start": text.index(name), "end": text.index(name) + len(name) - 1} for name in ("Ann", "Bob")]
    qas = [{"idx": 0, "query": query, "answers": [{"start": 0, "end": 2, "text": answer} for answer in answers]}]
    return json.dumps({"idx": 0, "source": "", "passage": {"text": text, "entities": spans}, "qas": qas})


LINES = [
    record(),
    "{broken",
    json.dumps({"idx": 3}),
    record(query="Nothing to fill."),
    record(query="@placeholder and @placeholder"),
    record(answers=()),
    "",
    record(query="word " * 600 + "@placeholder"),
    record(answers=("Cyd",)),
    json.dumps([1, 2]),
]


def test_prepare_on_a_full_disk_gives_one_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 would end the process."""
    write(tmp_path, [record()])
    monkeypatch.setattr(h5sparse.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(RunError, match=r"out.hdf5: cannot be written \(No space left on device\); free disk space"):
        prepare_file(tmp_path / "x.jsonl", tmp_path / "out.hdf5", False, str(VOCAB), 64, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_non_utf8_jsonl_error_names_the_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(record() + "\n", encoding=encoding)
    with pytest.raises(InputError, match=f"it is {encoding[:6].upper()}.* iconv -f {encoding[:6].upper()} -t UTF-8"):
        list(read_questions(tmp_path / "x.jsonl", True, SkippedRecords()))


@pytest.mark.parametrize("train", [True, False])
def test_skipped_records_have_reasons_and_line_numbers(train: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    skipped = SkippedRecords()
    kept = [question.line for _, found in read_questions(path, train, skipped) for question in found]
    assert kept == ([1, 8, 9] if train else [1, 8])
    expected = {
        "not JSON": [2],
        "not a ReCoRD record": [3, 10],
        "no @placeholder": [4],
        "more than one @placeholder": [5],
        "no right answer": [6],
    }
    assert skipped.lines == (expected if train else {**expected, "no right answer among the entities": [9]})


@pytest.mark.parametrize("workers", [0, 1])
def test_prepare_reports_skipped_records(workers: int, tmp_path: Path, capfd: Any) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "val.jsonl").write_text("\n".join(LINES) + "\n")
    out = tmp_path / "out"
    arguments = [
        f"data.raw_dir={raw}",
        f"data.vocab_file={VOCAB}",
        f"data.out_dir={out}",
        f"data.num_workers={workers}",
    ]
    assert lit_glm_here("prepare", *arguments) == 0
    said = capfd.readouterr().out
    assert "1 examples" in said
    assert "skipped 8" in said
    assert "1 x query longer than data.max_seq_length=512: line 8" in said
    assert not (out / "train_hdf5").exists()
    with SparseReader(out / "eval_hdf5" / "eval_sparse.hdf5", needs_answers=True) as reader:
        assert reader.num_examples == 1


@pytest.mark.process
def test_killed_prepare_worker_raises(tmp_path: Path) -> None:
    others = psutil.Process().children()
    questions = [found for _, found in read_questions(write(tmp_path, LINES[:1]), False, SkippedRecords())]

    def workers() -> List[psutil.Process]:
        mine = [process for process in psutil.Process().children() if process not in others]
        return [process for process in mine if "spawn_main" in " ".join(process.cmdline())]

    def chunks() -> Iterator[Any]:
        yield questions[0]
        while not workers():  # another process of multiprocessing starts first
            time.sleep(0.01)
        for worker in workers():
            worker.kill()
        yield questions[0]

    with pytest.raises(RunError, match="data.num_workers=1: a worker process was killed"):
        list(_encode_in_parallel(chunks(), str(VOCAB), 64, 1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "data.raw_dir is not set"),
        (["data.raw_dir=nowhere", f"data.vocab_file={VOCAB}"], "contains neither train.jsonl nor val.jsonl"),
        (["data.raw_dir=.", "data.vocab_file=nowhere.txt"], "data.vocab_file=nowhere.txt: cannot be read"),
    ],
)
def test_prepare_rejects_invalid_folders(overrides: "list[str]", said: str, capfd: Any) -> None:
    assert lit_glm_here("prepare", *overrides) == 2
    output = capfd.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err


@pytest.mark.process
@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ("eval_hdf5/eval_sparse.hdf5", "eval_sparse.hdf5"),
        ("eval_hdf5/eval_examples.jsonl", "eval_examples.jsonl"),
        ("prepared.json", "prepared.json"),
    ],
)
def test_prepare_does_not_overwrite_user_files(mine: str, said: str, tmp_path: Path, capfd: Any) -> None:
    """Also where it has written the training file there before: somebody's evaluation file may lie beside it."""
    out, raw = tmp_path / "out", tmp_path / "raw"
    how = [f"data.vocab_file={VOCAB}", f"data.out_dir={out}"]
    for name in ("train", "val"):
        (raw / name).mkdir(parents=True)
        (raw / name / f"{name}.jsonl").write_text(record() + "\n")
    if mine != "prepared.json":
        assert lit_glm_here("prepare", *how, f"data.raw_dir={raw}/train") == 0
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    assert lit_glm_here("prepare", *how, f"data.raw_dir={raw}/val") == 2
    assert said in capfd.readouterr().err
    assert (out / mine).read_text() == "mine"
    (out / mine).unlink()
    for _ in range(2):  # its own files may be replaced
        assert lit_glm_here("prepare", *how, f"data.raw_dir={raw}/val") == 0
