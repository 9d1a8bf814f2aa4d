"""What figures show: steps behind the warm-up, and runs named by what differs."""

from pathlib import Path

import numpy as np

from lit_glm.metrics.timing import warm_up
from lit_glm.reporting.i18n import Words
from lit_glm.reporting.plots import legends, percentiles
from lit_glm.reporting.row_format import label
from lit_glm.reporting.run_reader import find
from lit_glm.reporting.run_reader import rows as rows_of
from reporting.folders import make_run


def test_legends_name_what_differs(tmp_path: Path) -> None:
    for bs, lr in ((4, "1e-5"), (5, "1e-5"), (5, "2e-5")):
        make_run(tmp_path / f"{bs}{lr}", f"bs={bs}", f"lr={lr}")
    found = rows_of(find([str(tmp_path)])[0])
    assert legends(found, Words("en")) == ["bs=4 lr=1e-05", "bs=5 lr=1e-05", "bs=5 lr=2e-05"]
    assert legends(found[:1], Words("en")) == [label(found[0], Words("en"))]


def test_warm_up_and_percentiles_by_hand() -> None:
    assert [warm_up(steps) for steps in (0, 1, 2, 20, 40, 5000)] == [0, 0, 1, 1, 2, 50]
    seconds = np.concatenate([[100.0], np.full(9, 2.0), np.full(10, 4.0)])  # the first step is warm-up
    p50, p90, p99 = percentiles(seconds, 8.0)
    assert (p50, p90, p99) == (2.0, 2.0, 2.0)
    assert percentiles(np.concatenate([[1.0], np.full(99, 1.0)]), 8.0) == (8.0, 8.0, 8.0)
