"""Examples of ReCoRD's shape without its text: what a benchmark needs are lengths, not words.

    python benchmarks/corpus.py OUT.hdf5 --examples 1000 --context 280 --candidates 12 --tokens 4

Contexts have 60 to 140 % of the length asked for, examples 70 to 130 % as many candidates, candidates 1 to twice as
many tokens, evenly drawn; contexts are cut to what fits --width beside the candidate, as `prepare` cuts.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from lit_glm.data.h5sparse import SparseWriter

CLS, MASK, SOP, EOP = 101, 103, 30522, 30523


def write(path: Path, examples: int, context: int, candidates: int, tokens: int, width: int, seed: int) -> Path:
    """Write a file of the published layout; the right answer is candidate 0 everywhere."""
    generator = np.random.default_rng(seed)
    writer = SparseWriter(path, width)
    for first in range(0, examples, 256):
        count = min(256, examples - first)
        rows: Dict[str, List[Any]] = {name: [] for name in ("text", "target", "logit_mask", "position")}
        lengths: Dict[str, List[int]] = {name: [] for name in rows}
        columns: Dict[str, List[Any]] = {name: [] for name in rows}
        separators, counts = [], []

        def add(name: str, start: int, values: Any) -> None:
            (places,) = np.nonzero(values)  # zeros are not stored
            lengths[name].append(len(places))  # noqa: B023
            columns[name].append(places + start)  # noqa: B023
            rows[name].append(values[places])  # noqa: B023

        for _ in range(count):
            length = int(generator.integers(max(8, context * 6 // 10), context * 14 // 10 + 1))
            full = generator.integers(1000, 30000, length)
            full[0] = CLS
            blank_from_end = int(generator.integers(3, max(4, length // 8)))
            counts.append(int(generator.integers(-(-candidates * 7 // 10), candidates * 13 // 10 + 1)))
            for _ in range(counts[-1]):
                target = np.append(generator.integers(1000, 30000, generator.integers(1, 2 * tokens)), EOP)
                inputs = full[: width - len(target)].copy()
                blank = max(1, len(inputs) - blank_from_end)
                inputs[blank] = MASK
                n, m = len(inputs), len(target)
                add("text", 0, np.concatenate([inputs, [SOP], target[:-1]]))
                add("target", n, target)
                add("logit_mask", n, np.ones(m, np.int64))
                add("position", 0, np.concatenate([np.arange(n), np.full(m, blank)]))
                add("position", n, np.arange(1, m + 1))
                separators.append(n)
        packed = {}
        for name, values in rows.items():
            packed[name] = (np.asarray(lengths[name]), np.concatenate(columns[name]), np.concatenate(values))
        writer.add(packed, separators, counts, [[0]] * count)
    writer.close()
    return path


def cached(
    examples: int = 64, context: int = 280, candidates: int = 12, tokens: int = 4, width: int = 512, seed: int = 0
) -> Path:
    """The file of a shape in the temporary folder, written on first use."""
    shape = (examples, context, candidates, tokens, width, seed)
    name = "-".join(map(str, shape))
    path = Path(tempfile.gettempdir()) / "lit_glm-benchmarks" / f"{name}.hdf5"
    path.parent.mkdir(exist_ok=True)
    return path if path.exists() else write(path, *shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    shape = {"examples": 1000, "context": 280, "candidates": 12, "tokens": 4, "width": 512, "seed": 0}
    for key, value in shape.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    given = vars(parser.parse_args())
    path = write(given.pop("out"), **given)
    print(f"{path}: {os.path.getsize(path) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
