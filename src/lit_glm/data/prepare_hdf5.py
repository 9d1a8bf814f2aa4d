"""Streaming conversion of raw ReCoRD to the two HDF5 files of the published layout, with worker processes."""

import errno
import json
import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from rich.progress import DownloadColumn

import lit_glm
from lit_glm.atomic_files import read_json, write_json
from lit_glm.console import progress_bar
from lit_glm.data.cloze import EncodedExamples, WordPieceTokenizer, encode_questions
from lit_glm.data.h5sparse import SparseWriter
from lit_glm.data.superglue_jsonl import Question, SkippedRecords, read_questions
from lit_glm.errors import InputError, RunError
from lit_glm.process_utils import set_parent_death_signal

TRAIN_FILE = Path("train_hdf5/train_sparse.hdf5")
EVAL_FILE = Path("eval_hdf5/eval_sparse.hdf5")
EXAMPLE_METADATA_FILE = "eval_examples.jsonl"
"""File next to the evaluation file: one line per example, in order, with idx, candidates and answers as text."""
PREPARED_MARKER = "prepared.json"
"""File that marks the files of a folder as written by `prepare`."""
_CHUNK = 64  # raw lines per task of a worker


@dataclass
class PreparedFile:
    """Result of the conversion of one raw file."""

    path: Path
    examples: int
    candidates: int
    num_truncated: int
    """Candidates whose passage was truncated."""
    skipped: SkippedRecords

    def report(self) -> str:
        """Return a text with what was written and what was skipped."""
        lines = [
            f"{self.path}: {self.examples} examples, {self.candidates} candidates, "
            f"{self.num_truncated} of them truncated"
        ]
        if len(self.skipped):
            lines += [f"skipped {len(self.skipped)}:", self.skipped.report()]
        return "\n".join(lines)


_worker: Optional[Tuple[WordPieceTokenizer, int]] = None


def _start_worker(vocab_file: str, max_seq_length: int) -> None:
    global _worker
    _worker = WordPieceTokenizer(vocab_file), max_seq_length


def _start_worker_process(vocab_file: str, max_seq_length: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its workers
    set_parent_death_signal()
    _start_worker(vocab_file, max_seq_length)


def _encode_chunk(questions: List[Question]) -> EncodedExamples:
    assert _worker is not None
    return encode_questions(questions, *_worker)


def _read_chunks(path: Path, train: bool, skipped: SkippedRecords, bytes_read: List[int]) -> Iterator[List[Question]]:
    waiting: List[Question] = []
    lines = 0
    for position, questions in read_questions(path, train, skipped):
        waiting += questions
        lines += 1
        bytes_read[0] = position
        if lines == _CHUNK:
            yield waiting
            waiting, lines = [], 0
    yield waiting


def _encode_in_parallel(
    chunks: Iterator[List[Question]], vocab_file: str, max_seq_length: int, workers: int
) -> Iterator[EncodedExamples]:
    if workers < 1:
        _start_worker(vocab_file, max_seq_length)
        yield from map(_encode_chunk, chunks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    spawn = multiprocessing.get_context("spawn")
    vocabulary = (vocab_file, max_seq_length)
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker_process, initargs=vocabulary) as pool:
        # The number of pending chunks is bounded, so that a slow disk does not fill the memory.
        pending: List[Future[EncodedExamples]] = []
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode_chunk, chunk))
                if len(pending) > 3 * workers:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        except BrokenProcessPool as error:
            raise RunError(
                f"data.num_workers={workers}: a worker process was killed, probably for lack of memory; use fewer"
            ) from error
        finally:
            for result in pending:
                result.cancel()


def prepare_file(raw: Path, out: Path, train: bool, vocab_file: str, max_seq_length: int, workers: int) -> PreparedFile:
    """Convert one raw file to one HDF5 file.

    Args:
        raw: train.jsonl or val.jsonl.
        out: the HDF5 file; written atomically.
        train: whether it is the training file.
        vocab_file: vocabulary of word pieces.
        max_seq_length: maximum number of tokens of context and candidate together.
        workers: number of encoding processes; 0: encode in this process.

    Raises:
        InputError: if no line of the file can be used.
        RunError: if the disk is full.
    """
    skipped, bytes_read = SkippedRecords(), [0]
    built = PreparedFile(out, 0, 0, 0, skipped)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    writer = SparseWriter(out, max_seq_length)
    metadata_path = out.parent / EXAMPLE_METADATA_FILE
    temporary = metadata_path.with_name(f".{metadata_path.name}.{os.getpid()}.part")
    bar = progress_bar(raw.name, DownloadColumn())
    try:
        with bar, temporary.open("w", encoding="utf-8") as metadata_file:
            task = bar.add_task("", total=raw.stat().st_size)
            chunks = _read_chunks(raw, train, skipped, bytes_read)
            for encoded in _encode_in_parallel(chunks, vocab_file, max_seq_length, workers):
                writer.add(encoded.columns, encoded.separators, encoded.counts, encoded.right)
                built.examples += len(encoded.counts)
                built.candidates += len(encoded.separators)
                for line in encoded.too_long:
                    skipped.add(f"query longer than data.max_seq_length={max_seq_length}", line)
                for entry in encoded.metadata:
                    built.num_truncated += sum(removed > 0 for removed in entry["tokens_removed"])
                    if not train:
                        metadata_file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                bar.update(task, completed=bytes_read[0])
        if not built.examples:
            reasons = skipped.report() or "  the file is empty"
            raise InputError(f"{raw}: no usable line:\n{reasons}")
        writer.close()
        if not train:
            os.replace(temporary, metadata_path)
    except BaseException as error:
        writer.abandon()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{out}: cannot be written ({error.strerror}); free disk space, or give another data.out_dir="
            raise RunError(message) from error
        raise
    finally:
        if temporary.exists():
            temporary.unlink()
        with suppress(OSError):  # not empty
            for folder in new_folders:
                folder.rmdir()
    return built


def prepare_files(
    raw_dir: Path, out_dir: Path, vocab_file: str, max_seq_length: int, workers: int
) -> List[PreparedFile]:
    """Convert a folder with train.jsonl, val.jsonl or both to the published files.

    Raises:
        InputError: if neither exists, the vocabulary cannot be used, or other files would be overwritten.
    """
    WordPieceTokenizer(vocab_file)  # rejects a wrong vocabulary before any work
    jobs = [
        (raw_dir / name, out_dir / out, train)
        for name, out, train in (("train.jsonl", TRAIN_FILE, True), ("val.jsonl", EVAL_FILE, False))
        if (raw_dir / name).is_file()
    ]
    if not jobs:
        raise InputError(f"data.raw_dir={raw_dir}: contains neither train.jsonl nor val.jsonl")
    written = _files_written(out_dir, [path for _, out, train in jobs for path in _outputs(out, train)])
    built = []
    for raw, out, train in jobs:
        built.append(prepare_file(raw, out, train, vocab_file, max_seq_length, workers))
        written.update({str(path.relative_to(out_dir)): path.stat().st_size for path in _outputs(out, train)})
        marker = {"lit_glm": lit_glm.__version__, "max_seq_length": max_seq_length, "files": written}
        write_json(out_dir / PREPARED_MARKER, marker)
    return built


def _outputs(out: Path, train: bool) -> List[Path]:
    return [out] if train else [out, out.parent / EXAMPLE_METADATA_FILE]


def _files_written(out_dir: Path, files: List[Path]) -> Dict[str, int]:
    """Return the files that `prepare` has written to a folder, with their sizes in bytes.

    Raises:
        InputError: if one of them exists and was not written by `prepare`.
    """
    marker = out_dir / PREPARED_MARKER
    content = read_json(marker) or {}
    recorded = content.get("files")
    if not isinstance(recorded, dict):  # markers of earlier versions name no files
        recorded = {str(file.relative_to(out_dir)): None for file in files} if "lit_glm" in content else {}
    foreign = [marker] if marker.exists() and "lit_glm" not in content else []
    for file in filter(Path.exists, files):
        size = recorded.get(str(file.relative_to(out_dir)), -1)
        if size not in (None, file.stat().st_size):
            foreign.append(file)
    if foreign:
        raise InputError(
            f"data.out_dir={out_dir}: contains {', '.join(map(str, foreign))}, which prepare did not create and would "
            "overwrite; choose another data.out_dir="
        )
    return {name: size for name, size in recorded.items() if size is not None}
