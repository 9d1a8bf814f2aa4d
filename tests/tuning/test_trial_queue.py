"""What the first node of a search tells the others, and that nobody acts on what an earlier start has said."""

import threading
import time
from pathlib import Path
from typing import List, Tuple

import pytest

from lit_glm.errors import RunError
from lit_glm.tuning.coordinator import TrialQueue, iter_trials


def test_others_do_what_the_newest_start_orders(tmp_path: Path) -> None:
    TrialQueue(tmp_path).put(64, "killed")  # an earlier start, killed before it said that it is over
    seen: List[Tuple[int, str]] = []
    current = TrialQueue(tmp_path)
    reader = threading.Thread(target=lambda: [seen.append(order) for order in iter_trials(tmp_path, 20.0)])
    current.put(1, "a")
    reader.start()
    while not seen:
        time.sleep(0.01)
    current.put(2, "b")
    current.put(None, "")
    reader.join(timeout=20)
    assert seen == [(1, "a"), (2, "b")]


def test_a_start_that_is_over_is_waited_past(tmp_path: Path) -> None:
    before = TrialQueue(tmp_path)
    before.put(8, "x")
    before.put(None, "")
    with pytest.raises(RunError, match="node 0 started no trial for 0 s"):
        list(iter_trials(tmp_path, 0.5))
