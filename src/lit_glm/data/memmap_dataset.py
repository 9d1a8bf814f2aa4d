"""Memory-mapped dataset: the examples of a published HDF5 file without repetition, built once and cached.

The published layout stores a context once per candidate, in sparse matrices of 64-bit values. Here each context is
stored once, as 32-bit token ids; positions follow from the layout's rule and are checked, not stored. The cache is
built on first use in `data.cache_dir`, under a name that changes with the source file. The build runs in an isolated
process, because a damaged file may crash the HDF5 library. Shapes: N examples, G groups, C candidates.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from lit_glm.atomic_files import file_lock
from lit_glm.data.h5sparse import SparseReader, require_file
from lit_glm.errors import InputError
from lit_glm.isolated_process import ReportProgress, call_isolated, share_isolated_process

if TYPE_CHECKING:  # the isolated process that builds a cache imports no more than numpy and h5py
    from lit_glm.config.schema import DataConfig, ModelConfig, TrainConfig

CACHE_VERSION = 4
CACHE_ARRAYS = {
    "context_tokens": np.int32,  # contexts of all groups
    "group_context_end": np.int64,  # [G] end of each group's context in context_tokens
    "group_candidates": np.int32,  # [G] number of candidates
    "example_group_end": np.int64,  # [N]
    "example_candidate_end": np.int64,  # [N]
    "example_rows": np.int32,  # [N] rows in the packed layout: contexts and candidates
    "candidate_slot": np.int32,  # [C] index of a candidate in its example; candidates are stored group by group
    "candidate_blank": np.int32,  # [C] position of the [MASK] that the candidate fills
    "candidate_token_end": np.int64,  # [C] end of its rows in the two arrays below
    "candidate_inputs": np.int32,  # start-of-piece, then the candidate's tokens
    "candidate_targets": np.int32,  # the candidate's tokens, then end-of-piece
    "answers": np.int32,  # correct candidates of all examples
    "example_answer_end": np.int64,  # [N]
}


class MemmapDataset:
    """Memory-mapped, read-only examples of one HDF5 file."""

    def __init__(self, folder: Path, source: Path) -> None:
        """Map the arrays of `folder`, made from `source`.

        Raises:
            OSError, ValueError, KeyError: if a file is missing or damaged, or has the wrong size.
        """
        self.source = source
        self.meta: Dict[str, Any] = json.loads((folder / "meta.json").read_text())
        for name, dtype in CACHE_ARRAYS.items():
            size = self.meta["sizes"][name]
            if (folder / name).stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{folder / name} has the wrong size")
            # A plain array over the mapped pages: slicing np.memmap itself takes a microsecond longer.
            array = np.asarray(np.memmap(folder / name, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
            # Ranges are read from end arrays with a leading zero; these are small and used at every batch.
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
    def fingerprint(self) -> str:
        """Short hash of all tokens, positions and answers, which does not depend on the file's name or compression."""
        return str(self.meta["fingerprint"])

    def num_candidates_of(self, example: int) -> int:
        """Return the number of candidates of an example."""
        return int(self.example_candidate_end[example + 1] - self.example_candidate_end[example])

    def answers_of(self, example: int) -> Tuple[int, ...]:
        """Return the correct candidates of an example."""
        start, stop = self.example_answer_end[example], self.example_answer_end[example + 1]
        return tuple(int(answer) for answer in self.answers[start:stop])

    def check_fits_model(self, vocab_size: int, max_sequence_length: int, max_seq_length: int) -> None:
        """Check that these examples fit a model.

        Raises:
            InputError: on an id beyond the vocabulary, a position beyond the model's, a sequence beyond the data's.
        """
        token, row = self.meta["max_token"]
        if token >= vocab_size:
            raise InputError(
                f"{self.source}: group text or target, row {row}: token id {token} is beyond the vocabulary "
                f"(model.vocab_size={vocab_size}); model=glm_small, glm_base and glm_large have 30592 (BERT's)"
            )
        position, row = self.meta["max_position"]
        if position > max_sequence_length:
            raise InputError(
                f"{self.source}: group position, row {row}: position {position} is beyond the model's "
                f"(model.max_sequence_length={max_sequence_length}); prepare the data with a smaller "
                "data.max_seq_length, or use a model with more (model=glm_small, glm_base, glm_large have 512; "
                f"model.max_sequence_length={position})"
            )
        length, row = self.meta["max_length"]
        if length > max_seq_length:
            raise InputError(
                f"{self.source}: group text, row {row}: {length} tokens, more than "
                f"data.max_seq_length={max_seq_length}; it was prepared with more: data.max_seq_length={length}"
            )


def join_fingerprints(splits: "Tuple[MemmapDataset, MemmapDataset]") -> str:
    """Return the fingerprint of training and evaluation data, as in result.json."""
    return "-".join(split.fingerprint for split in splits)


def prepare_data(config: "TrainConfig") -> None:
    """Generate, convert and check the data, once for all ranks.

    Raises:
        InputError: if it does not fit the model, or has fewer examples than a step needs.
    """
    from lit_glm.data.synthetic import ensure_synthetic_data

    if config.data.synthetic is not None:
        ensure_synthetic_data(config.data)
    examples = len(open_datasets(config.data, config.model)[0])
    if config.global_batch > examples:
        ranks = config.topology.world_size
        raise InputError(
            f"bs={config.bs} on {ranks} device{'s' * (ranks > 1)} needs {config.global_batch} examples per step, but "
            f"{config.data.train_file} has {examples}: use a smaller bs, fewer devices, or more data"
        )


def open_datasets(data: "DataConfig", model: "ModelConfig") -> Tuple[MemmapDataset, MemmapDataset]:
    """Open training and evaluation data, and check that they fit the model.

    Called once before any rank starts, so that errors are reported once and the cache is built once; then by each rank,
    which finds the cache.

    Raises:
        InputError: names the file and the location of the error.
    """
    from lit_glm.console import progress_bar

    splits = []
    with share_isolated_process():
        for source, needs_answers in ((data.train_file, False), (data.eval_file, True)):
            with progress_bar(f"reading {Path(source).name}", transient=True) as bar:
                task = bar.add_task("")
                split = open_dataset(
                    source,
                    needs_answers,
                    data.cache_dir,
                    lambda done, total, bar=bar, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                )
            split.check_fits_model(model.vocab_size, model.max_sequence_length, data.max_seq_length)
            splits.append(split)
    return splits[0], splits[1]


def open_dataset(
    source: "str | os.PathLike[str]",
    needs_answers: bool,
    cache_dir: Optional[str],
    progress: Optional[ReportProgress] = None,
) -> MemmapDataset:
    """Open the cache of an HDF5 file; build it first if it is missing, stale or damaged.

    Args:
        source: HDF5 file of the published layout.
        needs_answers: whether it is an evaluation file, which has answers.
        cache_dir: folder of the caches; None: a temporary one for this process.
        progress: called with the progress of the conversion.

    Raises:
        InputError: if the file is missing, damaged, or violates the layout; names file and location.
    """
    path = Path(source).absolute()
    require_file(path)
    if cache_dir is not None:
        stat = path.stat()
        identity = f"{CACHE_VERSION}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{needs_answers}"
        folder = Path(cache_dir).expanduser() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        try:
            return MemmapDataset(folder, path)
        except (OSError, ValueError, KeyError):
            pass
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(folder.with_name(f"{folder.name}.lock")):
                return _build_cache_in(folder, path, needs_answers, progress)
        except OSError:
            pass  # run without a cache if it cannot be written
    with tempfile.TemporaryDirectory(prefix="lit_glm-") as temporary:
        call_isolated(build_cache, path, needs_answers, Path(temporary), progress=progress)
        return MemmapDataset(Path(temporary), path)  # mapped files stay readable after they are deleted


def _build_cache_in(
    folder: Path, source: Path, needs_answers: bool, progress: Optional[ReportProgress]
) -> MemmapDataset:
    try:
        return MemmapDataset(folder, source)  # another run has built it while this one waited
    except (OSError, ValueError, KeyError):
        pass
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=str(folder.parent)))
    try:
        call_isolated(build_cache, source, needs_answers, temporary / "new", progress=progress)
        if folder.exists():  # damaged; moved as a whole, so that no process sees parts of both
            os.rename(folder, temporary / "old")
        os.rename(temporary / "new", folder)
        return MemmapDataset(folder, source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_ROWS_AT_ONCE = 4096


def build_cache(path: Path, needs_answers: bool, folder: Path, progress: Optional[ReportProgress] = None) -> None:
    """Build the cache of an HDF5 file.

    Raises:
        InputError: if the file violates the layout; names file and location.
    """
    folder.mkdir(exist_ok=True)
    with SparseReader(path, needs_answers) as reader:
        separators = reader.vector("mask")
        choices = reader.pairs("choice_start_end")
        if len(separators) != reader.num_candidates or choices[-1, 1] != reader.num_candidates:
            raise InputError(
                f"{path}: {len(separators)} entries in mask, {choices[-1, 1]} candidates in choice_start_end, "
                f"{reader.num_candidates} rows in text: these must be equal"
            )
        empty = np.flatnonzero(choices[:, 0] == choices[:, 1])
        if len(empty):
            raise InputError(f"{path}: example {empty[0]} has no candidates, hence no correct one")
        answers, answer_ends = (
            _read_answers(reader, choices) if needs_answers else (np.zeros(0), np.zeros(len(choices)))
        )
        with ExitStack() as keep:
            writer = _CacheWriter({name: keep.enter_context((folder / name).open("wb")) for name in CACHE_ARRAYS})
            first = 0
            while first < len(choices):  # whole examples, about _ROWS_AT_ONCE candidates at a time
                start = choices[first, 0]
                last = int(np.searchsorted(choices[:, 1], start + _ROWS_AT_ONCE, side="right"))
                last = max(last, first + 1)
                stop = choices[last - 1, 1]
                _append_examples(writer, CandidateRows(reader, separators, start, stop), choices[first:last] - start)
                first = last
                if progress is not None:
                    progress(int(stop), reader.num_candidates)
            writer.put("answers", answers)
            writer.put("example_answer_end", answer_ends)
        about = {"sizes": writer.sizes, "num_tokens": reader.num_tokens, **writer.maxima}
        meta = {"source": str(path), "fingerprint": writer.fingerprint(), **about}
    (folder / "meta.json").write_text(json.dumps(meta, default=int))


def _read_answers(reader: SparseReader, choices: Any) -> Tuple[Any, Any]:
    answers = reader.vector("answer_idx")
    ranges = reader.pairs("answer_start_end")
    if len(ranges) != len(choices) or ranges[-1, 1] != len(answers):
        raise InputError(f"{reader.path}: answer_start_end does not fit choice_start_end or answer_idx")
    without = np.flatnonzero(ranges[:, 0] == ranges[:, 1])
    if len(without):
        raise InputError(f"{reader.path}: group answer_start_end, example {without[0]} has no right answer")
    owner = np.repeat(np.arange(len(ranges)), ranges[:, 1] - ranges[:, 0])
    wrong = np.flatnonzero((answers < 0) | (answers >= (choices[:, 1] - choices[:, 0])[owner]))
    if len(wrong):
        raise InputError(
            f"{reader.path}: group answer_idx, entry {wrong[0]}: example {owner[wrong[0]]} has no candidate "
            f"{answers[wrong[0]]}"
        )
    return answers, ranges[:, 1]


class CandidateRows:
    """Candidate rows start..stop-1 of a file, checked against the rules of the layout."""

    def __init__(self, reader: SparseReader, separators: Any, start: int, stop: int) -> None:
        self.first = start
        self.text = reader.rows("text", start, stop)
        self.target = reader.rows("target", start, stop)
        logit_mask = reader.rows("logit_mask", start, stop)
        position = reader.rows("position", 2 * start, 2 * stop).reshape(stop - start, 2, -1)
        self.separator = separators[start:stop]
        self.length = (logit_mask != 0).sum(1)
        column = np.arange(reader.num_tokens)
        ends = self.separator + self.length

        def refuse(group: str, wrong: Any, rule: str) -> None:
            if wrong.any():
                row = start + int(np.flatnonzero(wrong)[0])
                raise InputError(f"{reader.path}: group {group}, row {row}: {rule}")

        refuse(
            "mask",
            (self.separator < 1) | (ends > reader.num_tokens),
            f"context and candidate must fit {reader.num_tokens} tokens",
        )
        refuse("logit_mask", self.length < 1, "a candidate must have at least one token to predict")
        in_context = column < self.separator[:, None]
        in_candidate = ~in_context & (column < ends[:, None])
        refuse("logit_mask", ((logit_mask != 0) != in_candidate).any(1), "ones must follow the context without a gap")
        refuse("text", (self.text < 0).any(1) | (self.target < 0).any(1), "token ids must not be negative")
        self.blank = position[np.arange(len(ends)), 0, self.separator]
        expected = np.where(in_context, column, np.where(in_candidate, self.blank[:, None], 0))
        within = in_context | in_candidate
        refuse(
            "position",
            ((position[:, 0] != expected) & within).any(1),
            "positions must count the context, then repeat the [MASK]'s",
        )
        refuse(
            "position",
            (self.blank < 0) | (self.blank >= self.separator),
            "the position of a candidate must be one of its context",
        )
        expected = np.where(in_candidate, column - self.separator[:, None] + 1, 0)
        refuse("position", ((position[:, 1] != expected) & within).any(1), "block positions must be 0, then 1, 2, ...")


class _CacheWriter:
    def __init__(self, files: Dict[str, Any]) -> None:
        self._files = files
        self.sizes = dict.fromkeys(CACHE_ARRAYS, 0)
        self._hashes = {name: hashlib.blake2b(digest_size=8) for name in CACHE_ARRAYS}
        self.maxima: Dict[str, Tuple[int, int]] = {"max_token": (0, 0), "max_position": (0, 0), "max_length": (0, 0)}

    def put(self, name: str, values: Any) -> None:
        array = np.asarray(values, dtype=CACHE_ARRAYS[name])
        array.tofile(self._files[name])
        self._hashes[name].update(array.tobytes())
        self.sizes[name] += len(array)

    def fingerprint(self) -> str:
        """Return the hash of all arrays written so far."""
        digests = b"".join(self._hashes[name].digest() for name in CACHE_ARRAYS)
        return hashlib.sha256(digests).hexdigest()[:12]

    def track_max(self, name: str, values: Any, first_row: int) -> None:
        """Record the largest value and its row, for error messages."""
        row = int(np.argmax(values))
        if values[row] > self.maxima[name][0]:
            self.maxima[name] = (int(values[row]), first_row + row)


def _append_examples(writer: _CacheWriter, rows: CandidateRows, choices: Any) -> None:
    """Find the groups of each example and append everything, candidates group by group."""
    order: List[int] = []
    contexts: List[Any] = []
    group_candidates: List[int] = []
    example_groups: List[int] = []
    example_rows: List[int] = []
    for start, stop in choices:
        groups: Dict[Tuple[bytes, int], List[int]] = {}
        for row in range(start, stop):
            groups.setdefault((rows.text[row, : rows.separator[row]].tobytes(), rows.blank[row]), []).append(row)
        for members in groups.values():
            order += members
            contexts.append(rows.text[members[0], : rows.separator[members[0]]])
            group_candidates.append(len(members))
        example_groups.append(len(groups))
        example_rows.append(sum(map(len, contexts[-len(groups) :])) + int(rows.length[start:stop].sum()))
    place = np.asarray(order)
    examples = np.repeat(np.arange(len(choices)), choices[:, 1] - choices[:, 0])
    sizes = writer.sizes
    columns = np.arange(rows.text.shape[1])
    is_candidate_token = (columns >= rows.separator[:, None]) & (columns < (rows.separator + rows.length)[:, None])
    ends = np.cumsum(rows.length[place])
    writer.put("candidate_slot", place - choices[examples, 0])
    writer.put("candidate_blank", rows.blank[place])
    writer.put("candidate_token_end", sizes["candidate_inputs"] + ends)
    writer.put("candidate_inputs", rows.text[place][is_candidate_token[place]])
    writer.put("candidate_targets", rows.target[place][is_candidate_token[place]])
    writer.put("group_context_end", sizes["context_tokens"] + np.cumsum([len(context) for context in contexts]))
    writer.put("context_tokens", np.concatenate(contexts))
    writer.put("example_group_end", sizes["group_candidates"] + np.cumsum(example_groups))
    writer.put("group_candidates", group_candidates)
    writer.put("example_candidate_end", choices[:, 1] + sizes["candidate_slot"] - len(place))
    writer.put("example_rows", example_rows)
    writer.track_max("max_token", np.maximum(rows.text.max(1), rows.target.max(1)), rows.first)
    writer.track_max("max_position", np.maximum(rows.separator - 1, rows.length), rows.first)
    writer.track_max("max_length", rows.separator + rows.length, rows.first)


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
    def from_dataset(cls, split: MemmapDataset) -> "SequenceLengths":
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


def summarise_hdf5(path: Path, needs_answers: bool, _progress: ReportProgress) -> Dict[str, Any]:
    """Summarise an HDF5 file: counts, longest sequence, first and last example with the highest token id of both.

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
            "max_tokens": tokens,
            "first_and_last": ends,
            "max_token_id": highest,
        }
