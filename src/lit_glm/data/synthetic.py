"""Generated news in ReCoRD's format: learnable from scratch, and only by reading the passage.

Each passage reports how a race ended, one sentence per runner; a query asks who finished at one of the places. Names
and the queried place are drawn anew for every passage and each runner is named once, so neither the frequency nor the
position of a name gives the answer away: without the passage, accuracy is at chance level.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from lit_glm.atomic_files import file_lock, make_folder, read_json, write_text
from lit_glm.config.schema import DataConfig
from lit_glm.data.prepare_hdf5 import EVAL_FILE, TRAIN_FILE, prepare_files
from lit_glm.errors import InputError

_NAMES = (  # few, so that each is seen often and none correlates with a place
    "Abbott Bergman Castle Dalton Engel Fischer Gibson Hansen Ibsen Jensen Keller Larsen Moreau Norris Olsen Palmer "
    "Quinn Rivera Sutton Turner"
).split()
_ORDINALS = ["first", "second", "third", "fourth"]
_CITIES = (
    "Bergen Lisbon Vienna Prague Dublin Geneva Naples Porto Malmo Krakow Bilbao Zagreb Turku Leipzig Utrecht Cork "
    "Lille Turin"
).split()
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_VERBS = ["came", "finished", "was"]
# All sentences of a kind have one length: a small model learns the positions of names before their meaning.
_OPENINGS = ("Race in {place} .", "Rain in {place} .", "{day} in {place} .")
_HIGHLIGHTS = ("{place} race", "{place} results")
_QUERIES = ("Here @placeholder came {rank} .", "So @placeholder was {rank} .", "Again @placeholder finished {rank} .")
_VERSION = 1  # version of the generator; a new one regenerates existing data


def synthetic_vocabulary() -> List[str]:
    """Return the word pieces that cover the corpus, command tokens first."""
    texts = [*_NAMES, *_ORDINALS, *_CITIES, *_DAYS, *_VERBS, *_OPENINGS, *_HIGHLIGHTS, *_QUERIES, "- ."]
    words = {word.lower() for text in texts for word in text.replace("@placeholder", "").split() if "{" not in word}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]


# Quantiles (0, 5, ..., 100 %) of 422 queries of real news in ReCoRD's format, tokenised with the published vocabulary.
_PASSAGE_TOKENS = (
    48, 96, 110, 123, 132, 142, 153, 167, 182, 199, 231, 264, 284, 305, 328, 357, 403, 453, 518, 648, 1102,
)  # fmt: skip
_QUERY_TOKENS = (9, 13, 16, 17, 20, 21, 23, 24, 26, 27, 28, 29, 30, 32, 33, 35, 37, 39, 43, 52, 82)
_CANDIDATES = (3, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 17, 19, 22, 23, 26, 30, 40, 55)
_CANDIDATE_TOKENS = {1: 425, 2: 269, 3: 159, 4: 75, 5: 35, 6: 20, 7: 9, 8: 5, 9: 1, 10: 1}
"""Number of tokens of a candidate -> frequency per thousand."""


def _draw_quantile(generator: random.Random, quantiles: Sequence[int]) -> int:
    """Draw a number from the distribution with these quantiles, linearly interpolated."""
    place = generator.random() * (len(quantiles) - 1)
    low = int(place)
    return round(quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low]))


def _make_record(generator: random.Random, number: int, real_lengths: bool) -> Dict[str, Any]:
    """Make a record with one query in ReCoRD's format.

    Args:
        generator: source of all choices.
        number: index of the record and of its query.
        real_lengths: the lengths of real news: more runners, longer names, filler sentences.
    """
    names: List[str] = [] if real_lengths else generator.sample(_NAMES, len(_ORDINALS))
    count = max(len(_ORDINALS), _draw_quantile(generator, _CANDIDATES)) if real_lengths else len(_ORDINALS)
    while len(names) < count:
        (length,) = generator.choices(list(_CANDIDATE_TOKENS), list(_CANDIDATE_TOKENS.values()))
        name = " ".join(generator.choices(_NAMES, k=length))
        if name not in names:
            names.append(name)
    words = {"place": generator.choice(_CITIES), "day": generator.choice(_DAYS)}
    text, entities = generator.choice(_OPENINGS).format(**words), []
    for place, name in enumerate(names):
        text += " "
        entities.append({"start": len(text), "end": len(text) + len(name) - 1})
        has_rank = place < len(_ORDINALS)
        text += f"{name} {generator.choice(_VERBS)} " + (
            f"{_ORDINALS[place]} ." if has_rank else f"in {words['place']} ."
        )
    if real_lengths:
        text = _append_sentences(generator, text, _draw_quantile(generator, _PASSAGE_TOKENS) - len(text.split()))
    else:
        text += "\n@highlight\n" + generator.choice(_HIGHLIGHTS).format(**words)
    queried = generator.randrange(len(_ORDINALS))
    query = generator.choice(_QUERIES).format(rank=_ORDINALS[queried], **words)
    if real_lengths:
        query = _append_sentences(generator, query, _draw_quantile(generator, _QUERY_TOKENS) - len(query.split()))
    return {
        "idx": number,
        "source": "generated by lit_glm",
        "passage": {"text": text, "entities": entities},
        "qas": [{"idx": number, "query": query, "answers": [dict(entities[queried], text=names[queried])]}],
    }


def _append_sentences(generator: random.Random, text: str, tokens: int) -> str:
    """Append filler sentences of four tokens, up to a number of tokens."""
    for _ in range(max(0, tokens) // 4):
        text += f" Rain in {generator.choice(_CITIES)} ."
    return text


def write_synthetic_jsonl(folder: Path, seed: int, num_train: int, num_eval: int, lengths: str = "short") -> None:
    """Write train.jsonl, val.jsonl and vocab.txt; equal arguments give identical files."""
    make_folder(folder, "give another data.out_dir=")
    generator = random.Random(seed)
    for name, count, first in (("train.jsonl", num_train, 0), ("val.jsonl", num_eval, num_train)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for number in range(first, first + count):
                file.write(json.dumps(_make_record(generator, number, lengths == "record")) + "\n")
    (folder / "vocab.txt").write_text("\n".join(synthetic_vocabulary()) + "\n", encoding="utf-8")


def ensure_synthetic_data(data: DataConfig) -> None:
    """Generate and prepare the corpus, unless that was done before with the same settings.

    Raises:
        InputError: if the folder cannot be written.
    """
    assert data.synthetic is not None
    out = Path(data.out_dir)
    options = data.synthetic
    settings: List[Any] = [_VERSION, options.seed, options.num_train, options.num_eval, data.max_seq_length]
    settings += [] if options.lengths == "short" else [options.lengths]
    stamp = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    marker = out / "generated.json"

    def is_complete() -> bool:
        has_files = (out / TRAIN_FILE).is_file() and (out / EVAL_FILE).is_file()
        return has_files and (read_json(marker) or {}).get("stamp") == stamp

    if is_complete():
        return
    try:
        make_folder(out.parent, "give another data.out_dir=")
        with file_lock(out.with_name(f".{out.name}.lock")):
            if not is_complete():  # else another run has generated it meanwhile
                _generate_and_prepare(data, marker, settings, stamp, is_complete)
    except OSError as error:
        raise InputError(f"data.out_dir={out}: generated data cannot be written there ({error})") from error


def _generate_and_prepare(
    data: DataConfig, marker: Path, settings: List[Any], stamp: str, is_complete: Callable[[], bool]
) -> None:
    assert data.synthetic is not None
    out = marker.parent
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=str(out.parent)))
    try:
        options = data.synthetic
        write_synthetic_jsonl(temporary / "raw", options.seed, options.num_train, options.num_eval, options.lengths)
        prepare_files(temporary / "raw", temporary, str(temporary / "raw" / "vocab.txt"), data.max_seq_length, 0)
        (temporary / marker.name).write_text(json.dumps({"stamp": stamp, "settings": settings}))
        if is_complete():
            return  # a file system without locks: another run was faster
        _move_into_place(temporary, out, marker)
    except OSError:
        if not is_complete():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(made: Path, out: Path, marker: Path) -> None:
    """Move each generated file to its place; other files there are kept.

    Raises:
        InputError: if the folder contains data that was not generated.
    """
    names = sorted(path.name for path in made.iterdir())
    content = read_json(marker)
    is_ours = content is not None and (not content or {"stamp", "settings"} <= set(content))
    foreign = [] if is_ours else [name for name in names if (out / name).exists()]
    if foreign:
        raise InputError(
            f"data.out_dir={out}: contains {', '.join(foreign)}, which was not generated; choose another data.out_dir="
        )
    out.mkdir(exist_ok=True)
    write_text(marker, "{}\n")  # marks the folder as generated but incomplete
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file.name == marker.name):  # the marker last
        (out / file).parent.mkdir(exist_ok=True)
        os.replace(str(made / file), str(out / file))
