"""What figures show: steps behind the warm-up, and runs named by what differs."""

from pathlib import Path

import numpy as np

from lit_glm.metrics.timing import num_timing_warmup_steps
from lit_glm.reporting.definitions import Translations
from lit_glm.reporting.plots import legend_labels, throughput_percentiles
from lit_glm.reporting.row_format import row_label
from lit_glm.reporting.run_reader import find_runs
from lit_glm.reporting.run_reader import group_into_rows as rows_of
from reporting.folders import make_run


def test_legends_name_what_differs(tmp_path: Path) -> None:
    for bs, lr in ((4, "1e-5"), (5, "1e-5"), (5, "2e-5")):
        make_run(tmp_path / f"{bs}{lr}", f"bs={bs}", f"lr={lr}")
    found = rows_of(find_runs([str(tmp_path)])[0])
    assert legend_labels(found, Translations("en")) == ["bs=4 lr=1e-05", "bs=5 lr=1e-05", "bs=5 lr=2e-05"]
    assert legend_labels(found[:1], Translations("en")) == [row_label(found[0], Translations("en"))]


def test_warmup_steps_and_throughput_percentiles() -> None:
    assert [num_timing_warmup_steps(steps) for steps in (0, 1, 2, 20, 40, 5000)] == [0, 0, 1, 1, 2, 50]
    seconds = np.concatenate([[100.0], np.full(9, 2.0), np.full(10, 4.0)])  # the first step is warm-up
    p50, p90, p99 = throughput_percentiles(seconds, 8.0)
    assert (p50, p90, p99) == (2.0, 2.0, 2.0)
    assert throughput_percentiles(np.concatenate([[1.0], np.full(99, 1.0)]), 8.0) == (8.0, 8.0, 8.0)
