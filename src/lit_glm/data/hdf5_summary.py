"""Summary of an HDF5 file for the doctor. Runs in an isolated process (`lit_glm.isolated_process`).

Not part of `lit_glm.doctor`, which imports Hydra: that would take half of the process's time.
"""

from pathlib import Path
from typing import Any, Dict

from lit_glm.data.h5sparse import SparseReader
from lit_glm.data.memmap_dataset import CandidateRows
from lit_glm.errors import InputError
from lit_glm.isolated_process import ReportProgress


def summarise_hdf5(path: Path, needs_answers: bool, _progress: ReportProgress) -> Dict[str, Any]:
    """Summarise an HDF5 file: counts, longest sequence, highest token id, first and last example.

    Args:
        path: path of the file.
        needs_answers: whether it is an evaluation file, which has answers.

    Raises:
        InputError: if it is damaged, or not a file of this kind.
    """
    with SparseReader(path, needs_answers) as reader:
        separators, choices = reader.vector("mask"), reader.pairs("choice_start_end")
        ends, highest = [], 0
        for which, (start, stop) in (("first", choices[0]), ("last", choices[-1])):
            if start == stop:
                raise InputError(f"{path}: the {which} example has no candidates")
            rows = CandidateRows(reader, separators, start, stop)
            candidates = [
                rows.target[row, rows.separator[row] : rows.separator[row] + rows.length[row] - 1].tolist()
                for row in range(min(2, stop - start))
            ]
            ends.append((which, rows.text[0, : rows.separator[0]].tolist(), int(stop - start), candidates))
            highest = max(highest, int(rows.text.max()), int(rows.target.max()))
        tokens = int((separators + reader.row_lengths("logit_mask")).max())
        return {
            "examples": reader.num_examples,
            "candidates": reader.num_candidates,
            "tokens": tokens,
            "ends": ends,
            "highest": highest,
        }
