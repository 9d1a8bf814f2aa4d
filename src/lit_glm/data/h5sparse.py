"""Reader and writer of the published HDF5 layout with h5py: eight sparse matrices per file, one row per candidate.

Each group contains one CSR matrix as h5sparse 0.1 writes it: datasets `data`, `indices`, `indptr`, attributes
`h5sparse_format` and `h5sparse_shape`. Shapes: C candidates of all examples together, N examples, A answers, S tokens.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Tuple

import h5py
import numpy as np

from lit_glm.atomic_files import make_folder
from lit_glm.errors import InputError

TOKEN_MATRICES = ("text", "target", "logit_mask", "position")
"""Matrices of shape [C, S]; position has shape [2 C, S], with alternating positions and block positions."""
TRAIN_GROUPS = TOKEN_MATRICES + ("mask", "choice_start_end")
EVAL_GROUPS = TRAIN_GROUPS + ("answer_idx", "answer_start_end")

_MARGIN_BYTES = 2**22
"""Free disk space in addition to the next entries, for the chunks and tables that HDF5 has not written yet."""


def require_file(path: Path) -> None:
    """Check that a data file exists.

    Raises:
        InputError: if it does not.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; create it with `python -m lit_glm.prepare` or use generated data with "
            "data=synthetic"
        )


class SparseReader:
    """Reader of one HDF5 file of the published layout, in parts."""

    def __init__(self, path: "str | os.PathLike[str]", needs_answers: bool) -> None:
        """Open a file and check its layout.

        Args:
            path: the file.
            needs_answers: whether the two answer groups are required (evaluation).

        Raises:
            InputError: if the file is missing, is not an HDF5 file, is truncated, or lacks a group.
        """
        self.path = Path(path)
        require_file(self.path)
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(f"{self.path}: not a readable HDF5 file, or cut short ({error})") from error
        self._shapes: Dict[str, Tuple[int, int]] = {}
        try:
            for name in EVAL_GROUPS if needs_answers else TRAIN_GROUPS:
                self._check(name)
            self._check_sizes(needs_answers)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SparseReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def num_candidates(self) -> int:
        """Number of candidates of all examples, C."""
        return self._shapes["text"][0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens per row, S."""
        return self._shapes["text"][1]

    @property
    def num_examples(self) -> int:
        """Number of examples, N."""
        return self._shapes["choice_start_end"][0]

    def rows(self, name: str, start: int, stop: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Read rows start..stop-1 of a matrix as a dense int64 array."""
        group = self._file[name]
        try:
            bounds = np.asarray(group["indptr"][start : stop + 1], dtype=np.int64)
            columns = np.asarray(group["indices"][bounds[0] : bounds[-1]], dtype=np.int64)
            stored = group["data"][bounds[0] : bounds[-1]]
            values = np.asarray(stored, dtype=np.int64)
        except OSError as error:
            raise InputError(
                f"{self.path}: group {name}, rows {start} to {stop - 1}: cannot be read ({error})"
            ) from error
        width = self._shapes[name][1]
        lengths = np.diff(bounds)
        total = int(bounds[-1] - bounds[0])
        if (lengths < 0).any() or len(columns) != total or len(values) != total:
            raise InputError(f"{self.path}: group {name}: indptr does not fit indices and data")
        if stored.dtype.kind == "f" and not np.array_equal(stored, values):
            raise InputError(f"{self.path}: group {name}: contains numbers that are not whole")
        if total and (columns.min() < 0 or columns.max() >= width):
            raise InputError(f"{self.path}: group {name}: a column index outside 0..{width - 1}")
        dense = np.zeros((stop - start, width), dtype=np.int64)
        dense[np.repeat(np.arange(stop - start), lengths), columns] = values
        return dense

    def row_lengths(self, name: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Return the number of stored entries of each row of a matrix."""
        ends = np.asarray(self._file[name]["indptr"][:], dtype=np.int64)
        return ends[1:] - ends[:-1]

    def vector(self, name: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Read a matrix with one row or one column as a vector; files have either orientation."""
        return self.rows(name, 0, self._shapes[name][0]).reshape(-1)

    def pairs(self, name: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Read a [N, 2] matrix of (start, end) pairs, and check that the ranges are consecutive."""
        pairs = self.rows(name, 0, self._shapes[name][0])
        wrong = np.flatnonzero((pairs[:, 0] > pairs[:, 1]) | (pairs[:, 0] != np.r_[0, pairs[:-1, 1]]))
        if len(wrong):
            raise InputError(
                f"{self.path}: group {name}, example {wrong[0]}: range {pairs[wrong[0]].tolist()} does not start where "
                "the one before it ends"
            )
        return pairs

    def _check(self, name: str) -> None:
        group = self._file.get(name)
        if group is None:
            names = ", ".join(sorted(self._file)) or "nothing"
            raise InputError(f"{self.path}: group {name} is missing; the file contains {names}")
        try:
            layout = group.attrs["h5sparse_format"]
            shape = tuple(int(n) for n in group.attrs["h5sparse_shape"])
            lengths = [len(group[part]) for part in ("data", "indices", "indptr")]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: group {name} is not a sparse matrix as h5sparse writes it") from error
        layout = layout.decode() if isinstance(layout, bytes) else str(layout)
        if layout != "csr":
            raise InputError(f"{self.path}: group {name} has sparse format {layout!r}; only csr can be read")
        if len(shape) != 2 or lengths[0] != lengths[1] or lengths[2] != shape[0] + 1:
            raise InputError(f"{self.path}: group {name}: shape {shape} does not fit its datasets of lengths {lengths}")
        ends = int(group["indptr"][0]), int(group["indptr"][-1])
        if ends != (0, lengths[0]):
            raise InputError(
                f"{self.path}: group {name}: indptr goes from {ends[0]} to {ends[1]}, data to {lengths[0]}"
            )
        self._shapes[name] = shape

    def _check_sizes(self, needs_answers: bool) -> None:
        candidates, tokens = self._shapes["text"]
        for name, expected in (
            ("target", (candidates, tokens)),
            ("logit_mask", (candidates, tokens)),
            ("position", (2 * candidates, tokens)),
        ):
            if self._shapes[name] != expected:
                raise InputError(f"{self.path}: group {name} has shape {self._shapes[name]}; text requires {expected}")
        if sorted(self._shapes["mask"]) != sorted((1, candidates)):
            raise InputError(
                f"{self.path}: group mask has shape {self._shapes['mask']}; text requires {(1, candidates)} or "
                f"{(candidates, 1)}"
            )
        for name in ("choice_start_end", "answer_start_end") if needs_answers else ("choice_start_end",):
            if self._shapes[name] != (self.num_examples, 2):
                raise InputError(f"{self.path}: group {name} has shape {self._shapes[name]}, not [examples, 2]")
        if self.num_examples == 0 or candidates == 0:
            raise InputError(f"{self.path}: the file contains no examples")


def to_csr(dense: Any) -> Tuple[Any, Any, Any]:
    """Return row lengths, column indices and values of a matrix; zeros are not stored."""
    rows, indices = np.nonzero(dense)
    return np.bincount(rows, minlength=len(dense)), indices, dense[rows, indices]


class SparseWriter:
    """Streaming writer of the published layout: the token matrices are written in blocks of bounded size."""

    def __init__(self, path: "str | os.PathLike[str]", num_tokens: int) -> None:
        """Create a file under a temporary name; `close` renames it.

        Args:
            path: path of the finished file.
            num_tokens: number of tokens per row, S.
        """
        self.path = Path(path)
        self._num_tokens = num_tokens
        make_folder(self.path.parent, "give another data.out_dir=")
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._file = h5py.File(self._temporary, "w")
        self._matrices = {name: _GrowingCSR(self._file.create_group(name)) for name in TOKEN_MATRICES}
        self._separators: List[Any] = []
        self._ranges: List[Tuple[int, int]] = []
        self._answers: List[int] = []
        self._answer_ranges: List[Tuple[int, int]] = []
        self._candidates = 0

    def add(
        self,
        columns: Dict[str, Tuple[Any, Any, Any]],
        separators: Any,
        candidate_counts: List[int],
        answers: List[List[int]],
    ) -> None:
        """Append examples.

        Args:
            columns: (row lengths, column indices, values) of each token matrix, without zeros.
            separators: length of the context of each candidate.
            candidate_counts: number of candidates of each example.
            answers: correct candidates of each example.
        """
        # An int32 index and an int64 value for each entry, before they are compressed.
        self._check_space(12 * sum(len(indices) for _, indices, _ in columns.values()))
        for name, (lengths, indices, values) in columns.items():
            self._matrices[name].add(lengths, indices, values)
        self._separators.append(np.asarray(separators, dtype=np.int64))
        for count, right in zip(candidate_counts, answers):
            self._ranges.append((self._candidates, self._candidates + count))
            self._candidates += count
            self._answer_ranges.append((len(self._answers), len(self._answers) + len(right)))
            self._answers.extend(right)

    def _check_space(self, num_bytes: int = 0) -> None:
        """Raise OSError (ENOSPC) while space is left: HDF5 2.0.0 crashes the process when it flushes to a full disk."""
        if shutil.disk_usage(str(self.path.parent)).free < _MARGIN_BYTES + num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Write the small matrices, and rename the file atomically."""
        self._check_space()
        for name, growing in self._matrices.items():
            growing.finish((2 if name == "position" else 1) * self._candidates, self._num_tokens)
        separators = np.concatenate(self._separators) if self._separators else np.zeros(0, np.int64)
        for name, dense in (
            ("mask", separators.reshape(1, -1)),
            ("choice_start_end", np.asarray(self._ranges, dtype=np.int64).reshape(-1, 2)),
            ("answer_idx", np.asarray(self._answers, dtype=np.int64).reshape(1, -1)),
            ("answer_start_end", np.asarray(self._answer_ranges, dtype=np.int64).reshape(-1, 2)),
        ):
            growing = _GrowingCSR(self._file.create_group(name))
            growing.add(*to_csr(dense))
            growing.finish(*dense.shape)
        self._file.flush()
        self._file.close()
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        """Delete the temporary file, after an error or if there is nothing to write."""
        self._temporary.unlink()
        with suppress(OSError, RuntimeError):  # HDF5 also writes on closing, which fails on a full disk
            self._file.close()


class _GrowingCSR:
    """CSR matrix to which rows are appended; HDF5 buffers a chunk of each dataset."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._lengths: List[Any] = [np.zeros(0, np.int32)]
        chunked: Any = {"maxshape": (None,), "chunks": (65536,), "compression": "gzip", "compression_opts": 1}
        for name, dtype in (("data", np.int64), ("indices", np.int32)):
            group.create_dataset(name, (0,), dtype, shuffle=True, **chunked)

    def add(self, lengths: Any, indices: Any, values: Any) -> None:
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        for name, entries in (("indices", indices), ("data", values)):
            dataset = self._group[name]
            start = len(dataset)
            dataset.resize((start + len(entries),))
            dataset[start:] = entries

    def finish(self, rows: int, columns: int) -> None:
        indptr = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)
        self._group.create_dataset("indptr", data=indptr, compression="gzip")
        self._group.attrs["h5sparse_format"] = "csr"
        self._group.attrs["h5sparse_shape"] = np.asarray([rows, columns], dtype=np.int64)
