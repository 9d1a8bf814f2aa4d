"""What the size of a batch depends on: lengths of the examples, from the compact form or from an HDF5 file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_glm.data.h5sparse import SparseReader
from lit_glm.isolated_process import ReportProgress, call_isolated

if TYPE_CHECKING:  # the process that reads a file on its own needs no more than numpy and h5py
    from lit_glm.data.memmap_dataset import MemmapDataset


@dataclass
class SequenceLengths:
    """Of all examples, [N] each."""

    candidates: Any
    rows: Any
    """Of the flat layout: contexts and candidates."""
    predicting: Any
    """Of these, rows that predict a token."""
    pairs: Any
    """Of query and key in attention: n^2 + m (n + m) of each group of an example."""

    @classmethod
    def from_dataset(cls, split: "MemmapDataset") -> "SequenceLengths":
        """Of examples in the compact form."""
        ends = split.candidate_token_end[split.example_candidate_end]
        first = np.concatenate([[0], np.cumsum(split.group_candidates)])
        context = np.diff(split.group_context_end).astype(float)
        candidate = np.diff(split.candidate_token_end[first]).astype(float)
        pairs = np.concatenate([[0.0], np.cumsum(context * context + candidate * (context + candidate))])
        rows, pairs = split.example_rows, np.diff(pairs[split.example_group_end])
        return cls(np.diff(split.example_candidate_end), rows, np.diff(ends), pairs)

    @classmethod
    def from_hdf5(cls, path: Path) -> "SequenceLengths":
        """Of an HDF5 file that nothing has converted yet: as if no truncation made an example's contexts differ.

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
