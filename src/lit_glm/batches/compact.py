"""The examples of an HDF5 file without their repetitions, as arrays that are mapped into memory.

The published layout stores a context once a candidate, in sparse matrices of 64-bit values. Here it stands once, as
32-bit token ids one after the other; positions follow from the layout's rule and are checked, not stored.
Made on first use, in `data.cache_dir`, under a name that changes with the source. N examples, G groups, C candidates.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lit_glm.apart import Progress, call_apart
from lit_glm.batches.convert import convert
from lit_glm.batches.layout import ARRAYS, VERSION
from lit_glm.config.schema import DataConfig, ModelConfig
from lit_glm.errors import InputError
from lit_glm.files import one_at_a_time
from lit_glm.record.store import check_there


class CompactSplit:
    """The examples of one HDF5 file, read only."""

    def __init__(self, folder: Path, source: Path) -> None:
        """Map the arrays of `folder`, made from `source`.

        Raises:
            ValueError: if something in the folder is missing or has another size than it should.
        """
        self.source = source
        self.meta: Dict[str, Any] = json.loads((folder / "meta.json").read_text())
        for name, dtype in ARRAYS.items():
            size = self.meta["sizes"][name]
            if (folder / name).stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{folder / name} has the wrong size")
            # A plain array over the mapped pages: each slice of numpy's own class for them costs a microsecond more.
            array = np.asarray(np.memmap(folder / name, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
            # Ranges are read from end arrays with a zero in front; these are small and used at every batch.
            setattr(self, name, np.concatenate([[0], array]) if name.endswith("_end") else array)

    context_tokens: Any
    group_context_end: Any
    group_candidates: Any
    example_group_end: Any
    example_candidate_end: Any
    example_rows: Any
    candidate_slot: Any
    candidate_blank: Any
    candidate_token_end: Any
    candidate_inputs: Any
    candidate_targets: Any
    answers: Any
    example_answer_end: Any

    def __len__(self) -> int:
        return len(self.example_rows)

    @property
    def num_candidates(self) -> int:
        """Candidates of all examples together."""
        return len(self.candidate_slot)

    def answers_of(self, example: int) -> Tuple[int, ...]:
        """Right candidates of an example."""
        start, stop = self.example_answer_end[example], self.example_answer_end[example + 1]
        return tuple(int(answer) for answer in self.answers[start:stop])

    def check_fits(self, vocab_size: int, max_sequence_length: int, max_seq_length: int) -> None:
        """Check that a model can take these examples.

        Raises:
            InputError: on an id beyond the vocabulary, a position beyond the model's, a sequence beyond the data's.
        """
        token, row = self.meta["max_token"]
        if token >= vocab_size:
            raise InputError(
                f"{self.source}: group text or target, row {row}: token id {token} is beyond the vocabulary "
                f"(model.vocab_size={vocab_size}); model=glm_small, glm_base and glm_large have BERT's of 30592"
            )
        position, row = self.meta["max_position"]
        if position > max_sequence_length:
            raise InputError(
                f"{self.source}: group position, row {row}: position {position} is beyond the model's "
                f"(model.max_sequence_length={max_sequence_length}); prepare the data with a smaller "
                "data.max_seq_length, or take a model with more (model=glm_small, glm_base, glm_large have 512; "
                f"model.max_sequence_length={position})"
            )
        length, row = self.meta["max_length"]
        if length > max_seq_length:
            raise InputError(
                f"{self.source}: group text, row {row}: {length} tokens, more than "
                f"data.max_seq_length={max_seq_length}; it was prepared with more: data.max_seq_length={length}"
            )


def open_data(data: DataConfig, model: ModelConfig) -> Tuple[CompactSplit, CompactSplit]:
    """Open training and evaluation data and check that the model can take them.

    Called once before any rank starts, so that errors are said once and the compact form is made once; then by each
    rank, which finds it made.

    Raises:
        InputError: names the file and the place of what is wrong.
    """
    splits = []
    for source, needs_answers in ((data.train_file, False), (data.eval_file, True)):
        with RichProgress(
            TextColumn(f"reading {Path(source).name}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
            transient=True,
        ) as bar:
            task = bar.add_task("")
            split = open_split(
                source,
                needs_answers,
                data.cache_dir,
                lambda done, total, bar=bar, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
            )
        split.check_fits(model.vocab_size, model.max_sequence_length, data.max_seq_length)
        splits.append(split)
    return splits[0], splits[1]


def open_split(
    source: "str | os.PathLike[str]",
    needs_answers: bool,
    cache_dir: Optional[str],
    progress: Optional[Progress] = None,
) -> CompactSplit:
    """Open the compact form of an HDF5 file, and make it first where it is missing, stale or damaged.

    Args:
        source: HDF5 file of the published layout.
        needs_answers: whether it is evaluated on.
        cache_dir: where compact forms are kept; None: in a temporary place, for this process alone.
        progress: told how far the conversion is.

    Raises:
        InputError: if the file is missing, broken, or breaks a rule of the layout; names file and place.
    """
    path = Path(source).absolute()
    check_there(path)
    if cache_dir is not None:
        stat = path.stat()
        identity = f"{VERSION}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{needs_answers}"
        folder = Path(cache_dir).expanduser() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        try:
            return CompactSplit(folder, path)
        except (OSError, ValueError, KeyError):
            pass
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder.with_name(f"{folder.name}.lock")):
                return _make(folder, path, needs_answers, progress)
        except OSError:
            pass  # a cache that cannot be written is no reason not to run
    with tempfile.TemporaryDirectory(prefix="lit_glm-") as temporary:
        call_apart(convert, path, needs_answers, Path(temporary), progress=progress)
        return CompactSplit(Path(temporary), path)  # the mapped files live on after they are removed


def _make(folder: Path, source: Path, needs_answers: bool, progress: Optional[Progress]) -> CompactSplit:
    try:
        return CompactSplit(folder, source)  # another run has made it while this one waited
    except (OSError, ValueError, KeyError):
        pass
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=str(folder.parent)))
    try:
        call_apart(convert, source, needs_answers, temporary / "new", progress=progress)
        if folder.exists():  # damaged, and moved as a whole: nobody may take halves of two for one
            os.rename(folder, temporary / "old")
        os.rename(temporary / "new", folder)
        return CompactSplit(folder, source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
