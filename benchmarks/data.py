"""Data: how long is the first use of a data set of ReCoRD's size, how much memory does it take, how fast are batches?

    python benchmarks/data.py --examples 100000 --candidates 10        # 1,000,000 candidates; writes some GiB of HDF5
    python benchmarks/data.py --file train_sparse.hdf5

The conversion runs in a process of its own: its peak is the kernel's count. Batches are made by this project's reader
and by a double of the published one (each candidate's row of each matrix out of the HDF5 file by itself), in turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, List

import corpus
import h5py
import numpy as np
from engines import highest_memory
from scipy.sparse import csr_matrix

from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.memmap_dataset import open_dataset


class PublishedReader:
    """A double of how the published data set reads: row after row, a sparse matrix object for each."""

    def __init__(self, path: Path) -> None:
        self._file = h5py.File(str(path), "r")
        self._width = int(self._file["text"].attrs["h5sparse_shape"][1])
        self._choices = self._pairs("choice_start_end")

    def _pairs(self, name: str) -> Any:
        group = self._file[name]
        shape = tuple(group.attrs["h5sparse_shape"])
        return csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape).toarray()

    def _row(self, name: str, row: int) -> Any:
        group = self._file[name]
        start, stop = group["indptr"][row : row + 2]
        entries = (group["data"][start:stop], group["indices"][start:stop], np.array([0, stop - start]))
        return csr_matrix(entries, shape=(1, self._width)).toarray()

    def batch(self, indices: List[int]) -> int:
        """Read examples; returns how many rows."""
        rows = 0
        for index in indices:
            for candidate in range(*self._choices[index]):
                for name in ("text", "target", "logit_mask"):
                    self._row(name, candidate)
                self._row("position", 2 * candidate)
                self._row("position", 2 * candidate + 1)
                rows += 1
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    if given.convert:
        before = highest_memory()
        start = time.perf_counter()
        split = open_dataset(given.file, False, str(given.convert))
        seconds = time.perf_counter() - start
        highest = highest_memory()
        print(
            f"{len(split)} examples, {split.num_candidates} candidates: opened in {seconds:.3f} s, "
            f"peak {highest:.2f} GiB ({before:.2f} before)",
            flush=True,
        )
        return
    start = time.perf_counter()
    path = given.file or corpus.cached(examples=given.examples, candidates=given.candidates)
    print(f"{path}: {os.path.getsize(path) / 2**20:.0f} MiB (written or found in {time.perf_counter() - start:.1f} s)")
    with tempfile.TemporaryDirectory() as cache:
        for use in ("first use", "second use"):
            print(f"{use}: ", end="", flush=True)
            command = [sys.executable, __file__, "--file", str(path), "--convert", cache]
            subprocess.run(command, check=True)
        size = sum(entry.stat().st_size for entry in Path(cache).rglob("*") if entry.is_file())
        print(f"compact form: {size / 2**20:.0f} MiB")
        split, published = open_dataset(path, False, cache), PublishedReader(path)
        generator = np.random.default_rng(0)
        ratios: List[float] = []
        for _ in range(given.rounds):
            indices = generator.integers(0, len(split), 8).tolist()
            seconds = []
            for make in (
                lambda: published.batch(indices),  # noqa: B023
                lambda: collate_padded(split, indices, 512),  # noqa: B023
                lambda: collate_packed(split, indices),  # noqa: B023
            ):
                start = time.perf_counter()
                make()
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[2])
            last = seconds
        print(
            f"a batch of 8, last round: published reader {1000 * last[0]:.1f} ms, padded {1000 * last[1]:.2f} ms, "
            f"flat {1000 * last[2]:.2f} ms; median ratio published reader / flat {statistics.median(ratios):.0f}x"
        )


if __name__ == "__main__":
    main()
