"""The search itself, over chips that exist only as functions, and what it makes of a try that fails."""

import json
import signal
import sys
from pathlib import Path
from typing import Any, Callable, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.errors import RunError
from lit_glm.tuning.coordinator import TrialRunner
from lit_glm.tuning.search_state import FITS, MEMORY, TIME, Trial, fastest_bs, largest_bs, next_bs, trials_by_bs


def searched(capacity: int, most: int, speed: Callable[[int, int], float], repeats: int = 3) -> List[Trial]:
    tries: List[Trial] = []
    while True:
        bs = next_bs(tries, most, repeats)
        if bs is None:
            return tries
        assert 1 <= bs <= most
        assert len(tries) < 200
        tries.append(Trial(bs, FITS, speed(bs, len(tries))) if bs <= capacity else Trial(bs, MEMORY))


@given(capacity=st.integers(0, 3000), most=st.integers(1, 3000), knee=st.integers(1, 500))
def test_the_largest_that_fits_is_found_to_a_sixteenth(capacity: int, most: int, knee: int) -> None:
    tries = searched(capacity, most, lambda bs, _: bs / (bs + knee))
    fitting = min(capacity, most)
    if fitting == 0:
        assert largest_bs(tries) is None
        return
    found = largest_bs(tries) or 0
    assert found <= fitting <= found + max(1, found // 16)
    assert fastest_bs(tries) == found  # the larger, the faster
    assert len(trials_by_bs(tries)[found]) >= 2


@given(peak=st.integers(1, 400))
def test_a_fastest_one_in_between_is_found_nearly(peak: int) -> None:
    tries = searched(512, 10_000, lambda bs, _: 1.0 - abs(bs - peak) / 1000)
    found = fastest_bs(tries) or 0
    assert abs(found - peak) <= max(2, peak // 3)


def test_it_repeats_while_the_spread_hides_which_is_faster() -> None:
    noisy = searched(2, 10, lambda bs, _: 100.0, repeats=4)
    assert {bs: len(own) for bs, own in trials_by_bs(noisy).items()} == {1: 4, 2: 4}
    clear = searched(2, 10, lambda bs, number: 100.0 * bs + number % 2, repeats=4)
    assert {bs: len(own) for bs, own in trials_by_bs(clear).items()} == {1: 2, 2: 2}


class _Stub(TrialRunner):
    """A double of `train`: a program that ends as it is told."""

    def __init__(self, program: str) -> None:
        super().__init__([], [], 4)
        self._program = program

    def command(self, bs: int, folder: Path) -> List[str]:
        return [sys.executable, "-c", self._program, str(folder)]


def tried(program: str, folder: Path, seconds: float = 30.0) -> Trial:
    work: Any = None  # asked only of a run that ended well
    return _Stub(program).run(4, folder / "tries" / "bs4", work, seconds)


def test_memory_that_runs_out_is_an_answer(tmp_path: Path) -> None:
    result = json.dumps({"status": "failed", "error": "out of memory in step 1 (bs=4)"})
    said = f"import sys, pathlib; pathlib.Path(sys.argv[1], 'result.json').write_text({result!r}); sys.exit(1)"
    assert tried(said, tmp_path).status == MEMORY
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert tried(killed, tmp_path).status == MEMORY
    assert tried("import time; time.sleep(60)", tmp_path, 0.5).status == TIME


def test_another_failure_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="bs=4 exited with status 2: no such data"):
        tried("import sys; print('no such data'); sys.exit(2)", tmp_path)


def test_of_equals_the_smaller_batch_is_the_fastest() -> None:
    assert fastest_bs([Trial(4, FITS, 10.0), Trial(8, FITS, 10.0)]) == 4
