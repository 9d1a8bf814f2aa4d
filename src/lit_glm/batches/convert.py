"""An HDF5 file of the published layout to the compact form, checked against the rules of the layout.

Runs in a process of its own (`lit_glm.apart`): a damaged file may end it. N examples, G groups, C candidates.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from lit_glm.apart import Progress
from lit_glm.batches.layout import ARRAYS
from lit_glm.errors import InputError
from lit_glm.record.store import SparseReader

_ROWS_AT_ONCE = 4096


def convert(path: Path, needs_answers: bool, folder: Path, progress: Optional[Progress] = None) -> None:
    """Convert a file.

    Args:
        path: of the HDF5 file.
        needs_answers: whether it is evaluated on.
        folder: where the arrays go.
        progress: told how far it is.

    Raises:
        InputError: if the file breaks a rule of the layout; names file and place.
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
            raise InputError(f"{path}: example {empty[0]} has no candidates, so none that is right")
        answers, answer_ends = _answers(reader, choices) if needs_answers else (np.zeros(0), np.zeros(len(choices)))
        files = {name: open(folder / name, "wb") for name in ARRAYS}  # noqa: SIM115
        writer = _Writer(files)
        try:
            first = 0
            while first < len(choices):  # whole examples, about _ROWS_AT_ONCE candidates at a time
                start = choices[first, 0]
                last = int(np.searchsorted(choices[:, 1], start + _ROWS_AT_ONCE, side="right"))
                last = max(last, first + 1)
                stop = choices[last - 1, 1]
                _add_examples(writer, CandidateRows(reader, separators, start, stop), choices[first:last] - start)
                first = last
                if progress is not None:
                    progress(int(stop), reader.num_candidates)
            writer.put("answers", answers)
            writer.put("example_answer_end", answer_ends)
        finally:
            for file in files.values():
                file.close()
        meta = {"source": str(path), "sizes": writer.sizes, "num_tokens": reader.num_tokens, **writer.extremes}
    (folder / "meta.json").write_text(json.dumps(meta, default=int))


def _answers(reader: SparseReader, choices: Any) -> Tuple[Any, Any]:
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
            "a candidate must stand at a position of its context",
        )
        expected = np.where(in_candidate, column - self.separator[:, None] + 1, 0)
        refuse("position", ((position[:, 1] != expected) & within).any(1), "block positions must be 0, then 1, 2, ...")


class _Writer:
    def __init__(self, files: Dict[str, Any]) -> None:
        self._files = files
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.extremes: Dict[str, Tuple[int, int]] = {"max_token": (0, 0), "max_position": (0, 0), "max_length": (0, 0)}

    def put(self, name: str, values: Any) -> None:
        array = np.asarray(values, dtype=ARRAYS[name])
        array.tofile(self._files[name])
        self.sizes[name] += len(array)

    def note(self, name: str, values: Any, first_row: int) -> None:
        """Remember the largest value and its row, for messages that name the place."""
        row = int(np.argmax(values))
        if values[row] > self.extremes[name][0]:
            self.extremes[name] = (int(values[row]), first_row + row)


def _add_examples(writer: _Writer, rows: CandidateRows, choices: Any) -> None:
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
    own = (columns >= rows.separator[:, None]) & (columns < (rows.separator + rows.length)[:, None])
    ends = np.cumsum(rows.length[place])
    writer.put("candidate_slot", place - choices[examples, 0])
    writer.put("candidate_blank", rows.blank[place])
    writer.put("candidate_token_end", sizes["candidate_inputs"] + ends)
    writer.put("candidate_inputs", rows.text[place][own[place]])
    writer.put("candidate_targets", rows.target[place][own[place]])
    writer.put("group_context_end", sizes["context_tokens"] + np.cumsum([len(context) for context in contexts]))
    writer.put("context_tokens", np.concatenate(contexts))
    writer.put("example_group_end", sizes["group_candidates"] + np.cumsum(example_groups))
    writer.put("group_candidates", group_candidates)
    writer.put("example_candidate_end", choices[:, 1] + sizes["candidate_slot"] - len(place))
    writer.put("example_rows", example_rows)
    writer.note("max_token", np.maximum(rows.text.max(1), rows.target.max(1)), rows.first)
    writer.note("max_position", np.maximum(rows.separator - 1, rows.length), rows.first)
    writer.note("max_length", rows.separator + rows.length, rows.first)
