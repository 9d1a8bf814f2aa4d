"""What `evaluate` writes about each prediction."""

import json
import math
from pathlib import Path
from typing import Any, List

import pytest

from conftest import lit_glm_here
from lit_glm.errors import InputError
from lit_glm.evaluate import describe_predictions, read_example_metadata, score_predictions


class TwoExamples:
    """Test double of an evaluation file: two examples with two candidates each, the second of which is right."""

    def __len__(self) -> int:
        return 2

    def answers_of(self, _example: int) -> List[int]:
        return [1]

    def num_candidates_of(self, _example: int) -> int:
        return 2


ENTRY = {"candidates": ["a", "b"], "answers": ["b"], "tokens_removed": [0, 0]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ENTRY], "has 1 lines, .*eval.hdf5 has 2 examples; prepare both again"),
        ([ENTRY, {"candidates": []}], "entry 2 lacks candidates, answers or tokens_removed"),
        ([ENTRY, {**ENTRY, "answers": ["a"]}], "entry 2 is of another evaluation file"),
        ([{**ENTRY, "candidates": ["a", "b", "c"]}, ENTRY], "entry 1 is of another evaluation file"),
        ([ENTRY, "{"], "line 2 is not JSON"),
    ],
)
def test_metadata_of_other_examples_is_rejected(lines: List[Any], message: str, tmp_path: Path) -> None:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "eval_examples.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(InputError, match=message):
        read_example_metadata(tmp_path / "eval.hdf5", TwoExamples())


def test_metadata_is_optional(tmp_path: Path) -> None:
    """The published data has none."""
    assert read_example_metadata(tmp_path / "eval.hdf5", TwoExamples()) is None
    (tmp_path / "eval_examples.jsonl").write_text(f"{json.dumps(ENTRY)}\n{json.dumps(ENTRY)}\n")
    assert read_example_metadata(tmp_path / "eval.hdf5", TwoExamples()) == [ENTRY, ENTRY]


def test_several_devices_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("evaluate", "model.init_checkpoint=.", "topology=1x2") == 2
    assert "topology=1x2: evaluate runs on one device; leave topology out" in capfd.readouterr().err


def test_non_finite_scores_are_null_in_predictions() -> None:
    names = [{"idx": 7, "candidates": ["a", "b"], "answers": ["b"], "query": "@placeholder"}] * 2
    first, second = describe_predictions(
        [(0, 0), (1, 0)], {0: [-1.0, -2.0], 1: [math.nan, -2.0]}, lambda _: (1,), names
    )
    assert (first["label"], first["score"], first["rank"]) == ("a", -1.0, 2)
    assert (second["label"], second["score"], second["rank"]) == ("a", None, None)
    (none,) = describe_predictions([(0, -1)], {0: [-math.inf, -math.inf]}, lambda _: (1,), names)
    assert (none["label"], none["prediction"], none["score"]) == (None, None, None)
    assert score_predictions([{**names[0], "tokens_removed": [0, 0]}], [(0, -1)])["em"] == 0.0
    assert "NaN" not in json.dumps(second)
