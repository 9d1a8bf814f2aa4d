"""Encoding of questions as rows of the published layout: GLM's ReCoRD pattern 0, truncated, one row per candidate.

    [CLS] passage query-before [MASK] query-after [PAD] | <sop> candidate...      targets: candidate... <eop>

The end of the passage is truncated as far as each candidate needs, so candidates may have different contexts.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from lit_glm.data.superglue_jsonl import PLACEHOLDER, Question
from lit_glm.data.tokenizer import WordPieceTokenizer


@dataclass
class EncodedExamples:
    """Questions as sparse rows, in the form that `SparseWriter.add` takes."""

    columns: Dict[str, Tuple[Any, Any, Any]]
    separators: List[int]
    counts: List[int]
    right: List[List[int]]
    names: List[Dict[str, Any]]
    """Metadata with which `evaluate` labels its predictions: idx, candidates, answers, number of truncated tokens."""
    too_long: List[int]
    """Lines whose query and candidates exceed the limit even without the passage."""


@dataclass
class _SparseRows:
    lengths: List[int] = field(default_factory=list)
    indices: List[Any] = field(default_factory=list)
    values: List[Any] = field(default_factory=list)

    def add(self, first: int, values: Any) -> None:
        """Append a row whose entries begin at column `first`; zeros are not stored."""
        places = np.flatnonzero(values)
        self.lengths.append(len(places))
        self.indices.append(places + first)
        self.values.append(values[places])

    def arrays(self) -> Tuple[Any, Any, Any]:
        empty: List[Any] = [np.zeros(0, np.int64)]
        return np.asarray(self.lengths), np.concatenate(self.indices or empty), np.concatenate(self.values or empty)


def encode_questions(questions: List[Question], pieces: WordPieceTokenizer, max_seq_length: int) -> EncodedExamples:
    """Tokenise questions and lay out one row per candidate.

    Args:
        questions: the questions.
        pieces: the tokenizer.
        max_seq_length: maximum number of tokens of context and candidate together.
    """
    rows = {name: _SparseRows() for name in ("text", "target", "logit_mask", "position")}
    encoded = EncodedExamples({}, [], [], [], [], [])
    ids: Dict[str, List[int]] = {}

    def ids_of(text: str) -> Any:  # passages and candidates recur
        if text not in ids:
            ids[text] = pieces.encode(text)
        return ids[text]

    for question in questions:
        candidates = [[*ids_of(candidate), pieces.eop] for candidate in question.candidates]
        cuts = _tokens_to_remove(question, candidates, ids_of, max_seq_length)
        if cuts is None:
            encoded.too_long.append(question.line)
            continue
        passage = ids_of(question.passage)
        query = [*ids_of(question.before), pieces.mask, *ids_of(question.after), pieces.eos]
        for candidate, cut in zip(candidates, cuts):
            context = np.asarray([pieces.cls, *passage[: len(passage) - cut], *query])
            target = np.asarray(candidate)
            n, m = len(context), len(target)
            blank = int(np.flatnonzero(context == pieces.mask)[-1])
            rows["text"].add(0, np.concatenate([context, [pieces.sop], target[:-1]]))
            rows["target"].add(n, target)
            rows["logit_mask"].add(n, np.ones(m, np.int64))
            rows["position"].add(0, np.concatenate([np.arange(n), np.full(m, blank)]))
            rows["position"].add(n, np.arange(1, m + 1))
            encoded.separators.append(n)
        encoded.counts.append(len(candidates))
        encoded.right.append(question.right)
        encoded.names.append(
            {
                "idx": question.idx,
                "guid": question.guid,
                "query": f"{question.before}{PLACEHOLDER}{question.after}",
                "candidates": question.candidates,
                "answers": question.answers,
                "tokens_removed": cuts,
            }
        )
    encoded.columns = {name: matrix.arrays() for name, matrix in rows.items()}
    return encoded


def _tokens_to_remove(question: Question, candidates: List[List[int]], ids_of: Any, limit: int) -> Optional[List[int]]:
    """Return the number of passage tokens to remove for each candidate; None if the passage is too short."""
    passage = len(ids_of(question.passage))
    text = passage + len(ids_of(question.before)) + 1 + len(ids_of(question.after))
    cuts = [max(0, 1 + text + 1 + len(candidate) - limit) for candidate in candidates]
    return None if max(cuts) > passage else cuts
