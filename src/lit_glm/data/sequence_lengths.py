"""Sequence lengths of the examples, which determine the size of a batch; from the cache or from an HDF5 file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_glm.data.h5sparse import SparseReader
from lit_glm.isolated_process import ReportProgress, call_isolated

if TYPE_CHECKING:  # the isolated process that reads a file imports no more than numpy and h5py
    from lit_glm.data.memmap_dataset import MemmapDataset


@dataclass
class SequenceLengths:
    """Lengths of all examples, [N] each."""

    candidates: Any
    rows: Any
    """Rows in the packed layout: contexts and candidates."""
    predicting: Any
    """Rows that predict a token."""
    pairs: Any
    """Query-key pairs in attention: n^2 + m (n + m) for each group of an example."""

    @classmethod
    def from_dataset(cls, split: "MemmapDataset") -> "SequenceLengths":
        """Compute the lengths of a memory-mapped dataset."""
        ends = split.candidate_token_end[split.example_candidate_end]
        first = np.concatenate([[0], np.cumsum(split.group_candidates)])
        context = np.diff(split.group_context_end).astype(float)
        candidate = np.diff(split.candidate_token_end[first]).astype(float)
        pairs = np.concatenate([[0.0], np.cumsum(context * context + candidate * (context + candidate))])
        rows, pairs = split.example_rows, np.diff(pairs[split.example_group_end])
        return cls(np.diff(split.example_candidate_end), rows, np.diff(ends), pairs)

    @classmethod
    def from_hdf5(cls, path: Path) -> "SequenceLengths":
        """Read the lengths of an HDF5 file without a cache; assumes that all contexts of an example are equal.

        Raises:
            InputError: if the file cannot be read.
        """
        return cls(*call_isolated(_read_lengths, path))

    def __len__(self) -> int:
        return len(self.rows)


def _read_lengths(path: Path, _progress: ReportProgress) -> Any:
    with SparseReader(path, False) as reader:
        choices = reader.pairs("choice_start_end")
        tokens = reader.row_lengths("logit_mask")
        predicting = np.add.reduceat(tokens, choices[:, 0])
        contexts = np.maximum.reduceat(reader.vector("mask"), choices[:, 0])
        rows = contexts + predicting
        return np.diff(choices, axis=1)[:, 0], rows, predicting, contexts**2.0 + predicting * rows
