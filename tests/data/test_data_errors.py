"""What is wrong with a data file is said before training, with the file and the place."""

import shutil
import threading
from pathlib import Path
from typing import Any, Callable, List

import h5py
import numpy as np
import pytest

from conftest import EVAL_FILE, GOLDEN_RUN, TRAIN_FILE, lit_glm_here
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.errors import InputError


def broken(tmp_path: Path, source: Path, change: Callable[[Any], None]) -> Path:
    path = tmp_path / source.name
    shutil.copy(source, path)
    path.chmod(0o644)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def set_value(group: str, entry: int, value: int) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[group]["data"][entry] = value

    return change


def rewrite(group: str, dense: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[group]
        array = np.asarray(dense(file) if callable(dense) else dense)
        rows, columns = np.nonzero(array)
        made = file.create_group(group)
        made.attrs["h5sparse_format"] = "csr"
        made.attrs["h5sparse_shape"] = np.asarray(array.shape)
        made["data"], made["indices"] = array[rows, columns], columns.astype(np.int32)
        made["indptr"] = np.r_[0, np.cumsum(np.bincount(rows, minlength=len(array)))]

    return change


@pytest.mark.parametrize(
    ("source", "change", "said"),
    [
        (TRAIN_FILE, lambda f: f.__delitem__("target"), "group target is missing"),
        (TRAIN_FILE, lambda f: f["text"].attrs.__setitem__("h5sparse_format", "csc"), "sparse format 'csc'"),
        (TRAIN_FILE, lambda f: f["text"].attrs.__setitem__("h5sparse_shape", [3, 96]), "group text: shape (3, 96)"),
        (TRAIN_FILE, lambda f: f["text"].__delitem__("indptr"), "group text is not a sparse matrix"),
        (TRAIN_FILE, set_value("text", 40, -1), "group text, row 0: token ids must not be negative"),
        (TRAIN_FILE, set_value("position", 3, 77), "group position, row 0"),
        (TRAIN_FILE, rewrite("choice_start_end", np.zeros((0, 2), int)), "contains no examples"),
        (
            TRAIN_FILE,
            rewrite("choice_start_end", [[0, 0], [0, 231]]),
            "example 0 has no candidates, hence no correct one",
        ),
        (TRAIN_FILE, rewrite("choice_start_end", [[0, 3], [4, 231]]), "example 1: range [4, 231]"),
        (EVAL_FILE, rewrite("answer_start_end", [[0, 0]] * 22 + [[0, 35]]), "example 0 has no right answer"),
        (EVAL_FILE, rewrite("answer_idx", np.full((35, 1), 99)), "has no candidate 99"),
        (EVAL_FILE, lambda f: f.__delitem__("answer_idx"), "group answer_idx is missing"),
    ],
)
def test_invalid_hdf5_layout_is_rejected(source: Path, change: Any, said: str, tmp_path: Path) -> None:
    path = broken(tmp_path, source, change)
    with pytest.raises(InputError) as raised:
        open_dataset(path, source is EVAL_FILE, None)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


def test_truncated_missing_and_non_hdf5_files_are_rejected(tmp_path: Path) -> None:
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(TRAIN_FILE.read_bytes()[:50_000])
    text = tmp_path / "text.hdf5"
    text.write_text("no HDF5")
    for path in (cut, text, tmp_path / "missing.hdf5"):
        with pytest.raises(InputError, match=str(path)):
            open_dataset(path, False, None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.vocab_size=159", "beyond the vocabulary"),
        ("model.max_sequence_length=60", "beyond the model's"),
        ("data.max_seq_length=60", "more than data.max_seq_length=60"),
        ("data.train_file=nowhere.hdf5", "nowhere.hdf5: no such file"),
    ],
)
def test_train_rejects_data_that_does_not_fit_the_model(override: str, said: str, tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *GOLDEN_RUN, override, f"hydra.run.dir={tmp_path / 'run'}") == 2
    output = capfd.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err


def test_other_integer_widths_and_unsorted_columns(tmp_path: Path) -> None:
    def change(file: Any) -> None:
        for name in ("text", "position", "target", "logit_mask"):
            group = file[name]
            data, indices, indptr = (group[part][:] for part in ("data", "indices", "indptr"))
            for row in range(len(indptr) - 1):
                span = slice(indptr[row], indptr[row + 1])
                data[span], indices[span] = data[span][::-1].copy(), indices[span][::-1].copy()
            for part, array, dtype in (
                ("data", data, np.uint16),
                ("indices", indices, np.int64),
                ("indptr", indptr, np.int32),
            ):
                del group[part]
                group[part] = array.astype(dtype)
            group.attrs["h5sparse_format"] = np.bytes_(b"csr")

    ours, golden = (
        open_dataset(broken(tmp_path, TRAIN_FILE, change), False, None),
        open_dataset(TRAIN_FILE, False, None),
    )
    for name in ("context_tokens", "candidate_inputs", "candidate_targets", "candidate_blank", "candidate_slot"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(golden, name))


class TestCache:
    def test_cache_is_built_once_and_rebuilt_when_stale_or_damaged(self, tmp_path: Path) -> None:
        source = broken(tmp_path, TRAIN_FILE, lambda file: None)
        cache = tmp_path / "cache"
        conversions = []

        def opened() -> Any:
            return open_dataset(source, False, str(cache), lambda done, total: conversions.append(done))

        opened()
        opened()
        assert len(conversions) == 1
        damaged = next(cache.glob("*/context_tokens"))
        damaged.write_bytes(damaged.read_bytes()[:-4])
        assert len(opened()) == 37
        assert len(conversions) == 2
        with h5py.File(source, "r+") as file:
            file["text"]["data"][5] = 99
        assert opened().context_tokens[5] == 99
        assert len(conversions) == 3
        assert not list(cache.glob("*.part-*"))

    def test_concurrent_runs_build_the_cache_once(self, tmp_path: Path) -> None:
        cache, conversions, second = str(tmp_path / "cache"), [], []

        def first_converts(done: int, total: int) -> None:
            conversions.append(done)
            second.append(threading.Thread(target=lambda: opened.append(open_dataset(TRAIN_FILE, False, cache, also))))
            second[0].start()
            second[0].join(0.3)
            assert not opened  # it waits

        def also(done: int, total: int) -> None:
            conversions.append(done)

        opened: List[Any] = []
        first = open_dataset(TRAIN_FILE, False, cache, first_converts)
        second[0].join(30)
        assert len(conversions) == 1
        np.testing.assert_array_equal(opened[0].context_tokens, first.context_tokens)

    def test_unwritable_cache_dir_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert len(open_dataset(TRAIN_FILE, False, str(tmp_path / "file" / "cache"))) == 37


def test_the_fingerprint_changes_with_every_token_and_answer(tmp_path: Path) -> None:
    """And not with the name of the file, or how it is compressed."""

    def fingerprint(name: str, source: Path, change: Callable[[Any], None]) -> str:
        (tmp_path / name).mkdir()
        return open_dataset(broken(tmp_path / name, source, change), source == EVAL_FILE, None).fingerprint

    train, answers = (
        fingerprint(f"as-it-is-{n}", file, lambda f: None) for n, file in enumerate((TRAIN_FILE, EVAL_FILE))
    )
    with h5py.File(TRAIN_FILE) as file:
        token = int(file["text"]["data"][5])
    assert fingerprint("token", TRAIN_FILE, set_value("text", 5, token + 1 if token < 100 else token - 1)) != train

    def compress(file: Any) -> None:
        values = file["text"]["data"][()]
        del file["text"]["data"]
        file["text"].create_dataset("data", data=values, compression="gzip")

    assert fingerprint("compressed", TRAIN_FILE, compress) == train

    def other_answer(file: Any) -> None:
        entries = file["answer_idx"]["data"]  # the zeros are not stored
        entries[0] = 2 if entries[0] == 1 else 1

    assert fingerprint("answer", EVAL_FILE, other_answer) != answers
