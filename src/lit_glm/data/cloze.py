"""Encoding of questions as rows of the published layout: GLM's ReCoRD pattern 0, truncated, one row per candidate.

    [CLS] passage query-before [MASK] query-after [PAD] | <sop> candidate...      targets: candidate... <eop>

The end of the passage is truncated as far as each candidate needs, so candidates may have different contexts.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Match, Optional, Tuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from lit_glm.data.h5sparse import TOKEN_MATRICES, to_csr
from lit_glm.data.superglue_jsonl import PLACEHOLDER, Question
from lit_glm.errors import InputError


def _lower_sigma(text: str) -> str:
    """Lower-case capital sigmas by their place in the word, as Python does; the library lacks the final sigma."""

    def lower(word: Match[str]) -> str:
        lowered = word.group().replace("\u0130", "I").lower()  # U+0130 alone becomes two characters
        return "".join(low if char == "\u03a3" else char for char, low in zip(word.group(), lowered))

    return re.sub(r"\S*\u03a3\S*", lower, text) if "\u03a3" in text else text


class WordPieceTokenizer:
    """Tokenizer for BERT's uncased word pieces with GLM's command tokens.

    Command tokens are recognised anywhere in a text, case-sensitively; the rest is cleaned, lower-cased, stripped of
    accents, split at white space, punctuation and CJK ideographs, and covered by the longest matching pieces.
    """

    def __init__(self, vocab_file: "str | os.PathLike[str]") -> None:
        """Read a vocabulary.

        Args:
            vocab_file: one token per line; its id is the line number from 0. The two block symbols
                (start and end of piece) follow after the last line.

        Raises:
            InputError: if the file is missing or lacks a command token.
        """
        path = Path(vocab_file)
        try:
            # Split at line feeds only: a vocabulary may contain other characters that Python treats as line breaks.
            lines = path.read_bytes().decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.vocab_file={path}: cannot be read as UTF-8 text ({error})") from error
        tokens = [line.rstrip("\r") for line in lines]
        if tokens and not tokens[-1]:
            tokens.pop()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        missing = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name not in vocabulary]
        if missing:
            raise InputError(f"data.vocab_file={path}: lacks the tokens {', '.join(missing)}; is it a BERT vocabulary?")
        self.eos, self.cls, self.mask = (vocabulary[name] for name in ("[PAD]", "[CLS]", "[MASK]"))
        self.sop, self.eop = len(tokens), len(tokens) + 1
        self.size = len(tokens) + 2
        vocabulary.update({"<|startofpiece|>": self.sop, "<|endofpiece|>": self.eop})

        self._tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        commands = ("[PAD]", "[CLS]", "[MASK]", "[UNK]", "[SEP]", "<|startofpiece|>", "<|endofpiece|>")
        self._tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in commands])

    def encode(self, text: str) -> List[int]:
        """Return the word-piece ids of a text; [] for white space only."""
        return self._tokenizer.encode(_lower_sigma(text), add_special_tokens=False).ids


@dataclass
class EncodedExamples:
    """Questions as sparse rows, in the form that `SparseWriter.add` takes."""

    columns: Dict[str, Tuple[Any, Any, Any]]
    separators: List[int]
    counts: List[int]
    right: List[List[int]]
    metadata: List[Dict[str, Any]]
    """Metadata with which `evaluate` labels its predictions: idx, candidates, answers, number of truncated tokens."""
    too_long: List[int]
    """Lines whose query and candidates exceed the limit even without the passage."""


def encode_questions(questions: List[Question], tokenizer: WordPieceTokenizer, max_seq_length: int) -> EncodedExamples:
    """Tokenise questions and lay out one row per candidate.

    Args:
        questions: the questions.
        tokenizer: the tokenizer.
        max_seq_length: maximum number of tokens of context and candidate together.
    """
    rows: Dict[str, List[Any]] = {name: [] for name in TOKEN_MATRICES}
    encoded = EncodedExamples({}, [], [], [], [], [])
    ids: Dict[str, List[int]] = {}

    def ids_of(text: str) -> Any:  # passages and candidates recur
        if text not in ids:
            ids[text] = tokenizer.encode(text)
        return ids[text]

    for question in questions:
        candidates = [[*ids_of(candidate), tokenizer.eop] for candidate in question.candidates]
        cuts = _tokens_to_remove(question, candidates, ids_of, max_seq_length)
        if cuts is None:
            encoded.too_long.append(question.line)
            continue
        passage = ids_of(question.passage)
        query = [*ids_of(question.before), tokenizer.mask, *ids_of(question.after), tokenizer.eos]
        for candidate, cut in zip(candidates, cuts):
            context = np.asarray([tokenizer.cls, *passage[: len(passage) - cut], *query])
            n, stop = len(context), len(context) + len(candidate)
            text, target, logit_mask, position, block = np.zeros((5, max_seq_length), np.int32)
            text[:stop] = [*context, tokenizer.sop, *candidate[:-1]]
            target[n:stop], logit_mask[n:stop] = candidate, 1
            position[:n], position[n:stop] = np.arange(n), np.flatnonzero(context == tokenizer.mask)[-1]
            block[n:stop] = np.arange(1, stop - n + 1)
            for name, row in zip(TOKEN_MATRICES, (text, target, logit_mask, (position, block))):
                rows[name].append(row)
            encoded.separators.append(n)
        encoded.counts.append(len(candidates))
        encoded.right.append(question.right)
        encoded.metadata.append(
            {
                "idx": question.idx,
                "guid": question.guid,
                "query": f"{question.before}{PLACEHOLDER}{question.after}",
                "candidates": question.candidates,
                "answers": question.answers,
                "tokens_removed": cuts,
            }
        )
    encoded.columns = {
        name: to_csr(np.asarray(matrix, np.int32).reshape(-1, max_seq_length)) for name, matrix in rows.items()
    }
    return encoded


def _tokens_to_remove(question: Question, candidates: List[List[int]], ids_of: Any, limit: int) -> Optional[List[int]]:
    """Return the number of passage tokens to remove for each candidate; None if the passage is too short."""
    passage = len(ids_of(question.passage))
    text = passage + len(ids_of(question.before)) + 1 + len(ids_of(question.after))
    cuts = [max(0, 1 + text + 1 + len(candidate) - limit) for candidate in candidates]
    return None if max(cuts) > passage else cuts
