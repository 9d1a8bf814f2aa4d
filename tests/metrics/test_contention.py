"""A run notices that it is not alone."""

import os
import subprocess
import sys
import time
from typing import Optional

from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.metrics.contention import Others
from lit_glm.runs.result import marks


class Cards(Runtime):
    """A double: cards of which a driver counts the processes."""

    def __init__(self, processes: Optional[int]) -> None:
        self._processes = processes

    def processes_on(self, index: int) -> Optional[int]:
        return self._processes


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_own_work_is_not_others_and_anothers_is() -> None:
    others = Others(Cards(None), 1)
    others.begin()
    others.look()
    assert others.load is None  # too early to tell
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        _spin(2.5)
        others.look()
        with_child = others.load  # a child of ours is ours
    finally:
        child.kill()
        child.wait()
    assert with_child is not None
    stranger = Others(Cards(None), 1)
    stranger._own = lambda: 0.0  # type: ignore[method-assign]  # as if this process were somebody else's
    stranger.begin()
    _spin(2.5)
    assert stranger.look_now_and_then() is None  # not every moment
    stranger.look()
    alone = stranger.load
    assert alone is not None
    assert alone >= 0.8 / (os.cpu_count() or 1)


def test_other_processes_on_the_cards_are_said_once() -> None:
    others = Others(Cards(3), 1)
    said = others.look()
    assert said is not None
    assert "2 other processes" in said
    assert others.look() is None
    assert others.on_cards == 2


def test_alone_on_the_cards_nothing_is_said() -> None:
    others = Others(Cards(1), 1)
    assert others.look() is None
    assert others.on_cards == 0


def test_a_row_is_marked() -> None:
    row = {"status": "finished", "others_load": 0.42}
    assert marks(row) == ["beside others: 42% of the machine"]
    assert marks({**row, "others_load": 0.05}) == []
    assert marks({**row, "others_load": None, "others_on_cards": 1}) != []
