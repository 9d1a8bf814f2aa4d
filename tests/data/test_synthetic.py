"""The generated corpus: the same by seed, and no way to the answer but reading the passage."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import DataConfig, SyntheticConfig, TrainConfig
from lit_glm.data.cloze import WordPieceTokenizer
from lit_glm.data.memmap_dataset import SequenceLengths, open_dataset
from lit_glm.data.synthetic import ensure_synthetic_data, synthetic_vocabulary, write_synthetic_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_synthetic_jsonl(folder, seed=0, num_train=2000, num_eval=1000)
    return folder


def records(folder: Path, name: str) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def entity_names(record: Dict[str, Any]) -> List[str]:
    text = record["passage"]["text"]
    return [text[span["start"] : span["end"] + 1] for span in record["passage"]["entities"]]


def test_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for folder, seed in ((tmp_path / "same", 0), (tmp_path / "other", 1)):
        write_synthetic_jsonl(folder, seed, 2000, 1000)
        equal = (folder / "train.jsonl").read_bytes() == (corpus / "train.jsonl").read_bytes()
        assert equal is (seed == 0)


def test_baselines_that_ignore_the_passage_stay_near_chance(corpus: Path) -> None:
    train, held_out = records(corpus, "train.jsonl"), records(corpus, "val.jsonl")
    how_often = Counter(record["qas"][0]["answers"][0]["text"] for record in train)
    by_words: Counter = Counter()
    for record in train:
        for word in record["qas"][0]["query"].split():
            by_words[word, record["qas"][0]["answers"][0]["text"]] += 1
    generator = random.Random(0)
    chance = sum(1 / len(entity_names(record)) for record in held_out) / len(held_out)
    baselines = {
        "most often right in training": lambda names, query: max(names, key=lambda name: how_often[name]),
        "goes best with the words of the query": lambda names, query: max(
            names, key=lambda name: sum(by_words[word, name] for word in query.split())
        ),
        "first by alphabet": lambda names, query: min(names),
        "random": lambda names, query: generator.choice(names),
        **{f"stands at {place}": (lambda names, query, place=place: names[place]) for place in range(4)},
    }
    for name, choose in baselines.items():
        right = sum(
            choose(entity_names(record), record["qas"][0]["query"]) == record["qas"][0]["answers"][0]["text"]
            for record in held_out
        )
        assert abs(right / len(held_out) - chance) < 0.06, name


def test_entity_names_are_unique_and_words_are_in_the_vocabulary(corpus: Path) -> None:
    pieces = WordPieceTokenizer(corpus / "vocab.txt")
    unknown = synthetic_vocabulary().index("[UNK]")
    for record in records(corpus, "val.jsonl"):
        names = entity_names(record)
        assert len(set(names)) == len(names)
        assert all(record["passage"]["text"].count(name) == 1 for name in names)
        assert not any(name in record["qas"][0]["query"] for name in names)
        text = record["passage"]["text"].replace("@highlight\n", "- ") + " " + record["qas"][0]["query"]
        assert unknown not in pieces.encode(text.replace("@placeholder", ""))


def test_synthetic_data_is_regenerated_only_for_other_settings(tmp_path: Path) -> None:
    def data(seed: int) -> DataConfig:
        return DataConfig(
            "synthetic", out_dir=str(tmp_path / "out"), max_seq_length=64, synthetic=SyntheticConfig(seed, 20, 10)
        )

    ensure_synthetic_data(data(0))
    made = (tmp_path / "out" / "train_hdf5" / "train_sparse.hdf5").stat().st_mtime_ns
    ensure_synthetic_data(data(0))
    assert (tmp_path / "out" / "train_hdf5" / "train_sparse.hdf5").stat().st_mtime_ns == made
    ensure_synthetic_data(data(1))
    assert (tmp_path / "out" / "train_hdf5" / "train_sparse.hdf5").stat().st_mtime_ns != made
    assert not list(tmp_path.glob(".*.part-*"))


def test_synthetic_record_lengths_follow_the_real_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    how = [
        "data=synthetic",
        "data.synthetic.lengths=record",
        "data.synthetic.num_train=400",
        "data.synthetic.num_eval=2",
    ]
    config = validate_config(compose_config("train", how), TrainConfig)
    assert config.data.max_seq_length == 512
    ensure_synthetic_data(config.data)
    split = open_dataset(config.data.train_file, False, None)
    lengths = SequenceLengths.from_dataset(split)
    # 352 examples of real news, in the published vocabulary: median 308, mean 517 rows (contexts that are cut
    # differ by candidate), 9.1 candidates.
    assert 250 < float(np.median(lengths.rows)) < 400
    assert 400 < float(np.mean(lengths.rows)) < 650
    assert 8.5 < float(np.mean(lengths.candidates)) < 10.0
    short = validate_config(compose_config("train", ["data=synthetic"]), TrainConfig)
    assert short.data.max_seq_length == 128
