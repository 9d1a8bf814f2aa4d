"""Parser of raw ReCoRD (SuperGLUE v2 JSONL) to questions with candidates, by the rules of THUDM's RecordProcessor.

https://github.com/THUDM/GLM, tasks/superglue: standardised punctuation, sorted distinct entities, one training example
per correct answer with at most nine other candidates, one evaluation example per query with all entities.
"""

import codecs
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from lit_glm.errors import InputError

_PLAIN_PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-"})
PLACEHOLDER = "@placeholder"
_MAX_WRONG_CANDIDATES = 9  # wrong candidates of a training example
_SHUFFLE_SEED = 42
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


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
    """Indices of the correct candidates; [0] in training."""


@dataclass
class SkippedRecords:
    """Lines and queries that could not be used, by reason."""

    lines: Dict[str, List[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Add a skipped line."""
        self.lines.setdefault(reason, []).append(line)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def report(self) -> str:
        """Return one line per reason, with at most ten line numbers each."""
        rows = []
        for reason, lines in sorted(self.lines.items()):
            more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
            rows.append(f"  {len(lines)} x {reason}: line {', '.join(map(str, lines[:10]))}{more}")
        return "\n".join(rows)


def normalise_punctuation(text: str) -> str:
    """Replace curly quotes and en dashes by plain ones, character by character, so that offsets stay valid."""
    return text.translate(_PLAIN_PUNCTUATION)


def read_questions(path: Path, train: bool, skipped: SkippedRecords) -> Iterator[Tuple[int, List[Question]]]:
    """Read a file of raw records.

    Args:
        path: train.jsonl or val.jsonl.
        train: which of the two rules for candidates applies.
        skipped: collects the lines and queries that cannot be used.

    Yields:
        (bytes read so far, the questions of one line).
    """
    generator = random.Random(_SHUFFLE_SEED)
    read = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            read += len(raw)
            if number == 1:
                _reject_wide_characters(path, raw)
            if raw.startswith(codecs.BOM_UTF8):  # at the start of a file, or of one of several that were concatenated
                raw = raw[len(codecs.BOM_UTF8) :]
            if not raw.strip():
                continue
            state = generator.getstate()
            try:
                questions = _parse_questions(_parse_json(raw), number, train, generator, skipped)
            except UnusableRecord as error:
                skipped.add(str(error), number)
                generator.setstate(state)  # later lines draw as if this one did not exist
            else:
                yield read, questions


class UnusableRecord(Exception):
    """Exception with the reason why a line is skipped."""


def _reject_wide_characters(path: Path, raw: bytes) -> None:
    """Reject a file in UTF-16 or UTF-32, which cannot be split into lines as bytes.

    Raises:
        InputError: with the command that converts it.
    """
    is_utf32 = raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or b"\0\0\0" in (raw[:3], raw[1:4])
    if is_utf32 or raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:2]:
        name = "UTF-32" if is_utf32 else "UTF-16"
        raise InputError(f"{path}: not UTF-8 (it is {name}); convert it: iconv -f {name} -t UTF-8 {path} > FILE")


def _parse_json(raw: bytes) -> Any:
    """Parse a line as JSON, and check that its strings can be encoded as UTF-8."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise UnusableRecord(f"not UTF-8{_likely_encoding(raw)}") from None
    except (ValueError, RecursionError):
        raise UnusableRecord("not JSON") from None
    if _SURROGATE.search(raw):
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableRecord("half of a character (a lone surrogate)") from None
    return record


def _likely_encoding(raw: bytes) -> str:
    """Return a hint to the other encoding in which a line is JSON, and how to convert the file; "" if unknown."""
    for name in ("gbk", "big5", "latin-1"):
        try:
            json.loads(raw.decode(name))
        except (ValueError, RecursionError):
            continue
        return f" (decodes as {name.upper()}; convert the file: iconv -f {name.upper()} -t UTF-8)"
    return ""


def _require_field(container: Any, key: str, kind: type, problem: str) -> Any:
    """Return an entry of an object.

    Raises:
        UnusableRecord: if it is missing or has another type.
    """
    value = container.get(key) if isinstance(container, dict) else None
    if not isinstance(value, kind):
        raise UnusableRecord(problem)
    return value


def _entity_texts(text: str, spans: List[Any]) -> List[str]:
    """Return the distinct texts of spans, sorted; the end of a span is inclusive."""
    texts = set()
    for span in spans:
        start, end = (_int_field(span, key) for key in ("start", "end"))
        if start < 0 or end < 0:
            raise UnusableRecord("an entity at a negative offset")
        if end < start:
            raise UnusableRecord("an entity that ends before it starts")
        if end >= len(text):
            raise UnusableRecord("an entity beyond the text")
        texts.add(text[start : end + 1])
    return sorted(texts)


def _int_field(span: Any, key: str) -> int:
    value = span.get(key) if isinstance(span, dict) else None
    is_integer = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_integer:
        raise UnusableRecord("an entity whose offset is not an integer")
    return int(value)  # type: ignore[arg-type]


def _parse_questions(
    record: Any, line: int, train: bool, generator: random.Random, skipped: SkippedRecords
) -> List[Question]:
    passage = _require_field(record, "passage", dict, "not a ReCoRD record")
    text = normalise_punctuation(_require_field(passage, "text", str, "no text"))
    entities = _entity_texts(text, _require_field(passage, "entities", list, "no entities"))
    queries = _require_field(record, "qas", list, "no questions")
    if not queries:
        raise UnusableRecord("no questions")
    if "idx" not in record:
        raise UnusableRecord("no idx")
    questions: List[Question] = []
    for query in queries:
        parts = normalise_punctuation(_require_field(query, "query", str, "a question without text")).split(PLACEHOLDER)
        given = query.get("answers") or []
        if not isinstance(given, list) or "idx" not in query:
            raise UnusableRecord("a question without idx, or with answers that are not a list")
        # The reference keeps answers in a set; ascending order is one of its orders and the one of the golden files.
        answers = sorted(
            {normalise_punctuation(_require_field(answer, "text", str, "an answer without text")) for answer in given}
        )
        if len(parts) != 2:
            skipped.add("no @placeholder" if len(parts) < 2 else "more than one @placeholder", line)
        elif not answers:
            skipped.add("no right answer", line)
        else:
            p, q = record["idx"], query["idx"]
            built: List[Tuple[str, Any, List[str], List[int]]] = []  # guid, idx, candidates, right
            if train:
                for number, answer in enumerate(answers):
                    candidates = [answer, *_wrong_candidates(entities, answers, generator)]
                    built.append((f"train-p{p}-q{q}-a{number}", [p, q, number], candidates, [0]))
            else:
                right = [place for place, entity in enumerate(entities) if entity in answers]
                if right:
                    built.append((f"dev-p{p}-q{q}", q, entities, right))
                else:
                    skipped.add("no right answer among the entities", line)
            shown = text.replace("@highlight\n", "- ")
            for guid, idx, candidates, right in built:
                questions.append(Question(line, guid, idx, shown, parts[0], parts[1], candidates, answers, right))
    return questions


def _wrong_candidates(entities: List[str], answers: List[str], generator: random.Random) -> List[str]:
    """Return the wrong candidates of a training example, at most nine of them, drawn in random order."""
    wrong = [entity for entity in entities if entity not in answers]
    if len(wrong) > _MAX_WRONG_CANDIDATES:
        generator.shuffle(wrong)
    return wrong[:_MAX_WRONG_CANDIDATES]
