"""What `evaluate` writes about each prediction."""

import json
import math

from lit_glm.evaluate import describe_predictions, score_predictions


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
