"""Raw ReCoRD (SuperGLUE v2 JSONL) to questions with candidates, by the rules of THUDM's RecordProcessor.

https://github.com/THUDM/GLM, tasks/superglue: standardised punctuation, sorted distinct entities, one training example
for each right answer with at most nine others, one evaluation example for each query with all entities.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-"})
_PLACEHOLDER = "@placeholder"
_OTHERS = 9  # wrong candidates of a training example
_SHUFFLE_SEED = 42


@dataclass
class Question:
    """One example before tokenisation."""

    line: int
    guid: str
    idx: Any
    passage: str
    before: str
    """The query up to the placeholder."""
    after: str
    candidates: List[str]
    answers: List[str]
    right: List[int]
    """Candidates that are right; in training [0]."""


@dataclass
class Skipped:
    """Lines and queries that could not be used, by reason."""

    lines: Dict[str, List[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Count one."""
        self.lines.setdefault(reason, []).append(line)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def report(self) -> str:
        """A line a reason, with at most ten line numbers each."""
        rows = []
        for reason, lines in sorted(self.lines.items()):
            more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
            rows.append(f"  {len(lines)} x {reason}: line {', '.join(map(str, lines[:10]))}{more}")
        return "\n".join(rows)


def standardise(text: str) -> str:
    """Curly quotes and en dashes to plain ones; one character for one, so that offsets stay valid."""
    return text.translate(_PLAIN)


def read_questions(path: Path, train: bool, skipped: Skipped) -> Iterator[Tuple[int, List[Question]]]:
    """Read a file of raw records.

    Args:
        path: train.jsonl or val.jsonl.
        train: which of the two rules for candidates applies.
        skipped: gets what cannot be used.

    Yields:
        (bytes read so far, the questions of one line).
    """
    generator = random.Random(_SHUFFLE_SEED)
    read = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            read += len(raw)
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except ValueError:  # UnicodeDecodeError is one too
                skipped.add("not JSON", number)
                continue
            try:
                questions = _questions(record, number, train, generator, skipped)
            except (KeyError, TypeError, AttributeError):
                skipped.add("not a ReCoRD record", number)
                continue
            yield read, questions


def _questions(record: Any, line: int, train: bool, generator: random.Random, skipped: Skipped) -> List[Question]:
    text = standardise(record["passage"]["text"])
    spans = record["passage"]["entities"]
    entities = sorted({text[int(span["start"]) : int(span["end"]) + 1] for span in spans})
    passage = text.replace("@highlight\n", "- ")
    found = []
    for query in record["qas"]:
        pieces = standardise(query["query"]).split(_PLACEHOLDER)
        # The reference keeps answers in a set; ascending order is one of its orders and the one of the golden files.
        answers = sorted({standardise(answer["text"]) for answer in query.get("answers") or []})
        if len(pieces) != 2:
            skipped.add("no @placeholder" if len(pieces) < 2 else "more than one @placeholder", line)
            continue
        if not answers:
            skipped.add("no right answer", line)
            continue
        common: Dict[str, Any] = {
            "line": line,
            "passage": passage,
            "before": pieces[0],
            "after": pieces[1],
            "answers": answers,
        }
        if not train:
            right = [place for place, entity in enumerate(entities) if entity in answers]
            if not right:
                skipped.add("no right answer among the entities", line)
                continue
            guid = f"dev-p{record['idx']}-q{query['idx']}"
            found.append(Question(guid=guid, idx=query["idx"], candidates=entities, right=right, **common))
            continue
        for number, answer in enumerate(answers):
            others = [entity for entity in entities if entity not in answers]
            if len(others) > _OTHERS:
                generator.shuffle(others)
                others = others[:_OTHERS]
            guid = f"train-p{record['idx']}-q{query['idx']}-a{number}"
            idx = [record["idx"], query["idx"], number]
            found.append(Question(guid=guid, idx=idx, candidates=[answer, *others], right=[0], **common))
    return found
