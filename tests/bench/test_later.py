"""What is put off is done, in order, and its errors come back."""

import threading
import time

import pytest

from lit_glm.bench.later import Later
from lit_glm.errors import RunError


def test_in_order_and_not_by_the_caller() -> None:
    later, done = Later(), []

    def slow(number: int) -> None:
        time.sleep(0.001)
        done.append((number, threading.current_thread() is threading.main_thread()))

    for number in range(20):
        later.do(lambda number=number: slow(number))  # type: ignore[misc]
    later.drain()
    assert done == [(number, False) for number in range(20)]
    later.close()


def test_an_error_comes_back_once_and_the_rest_is_done() -> None:
    later, done = Later(), []  # type: Later, List[int]
    later.do(lambda: 1 // 0)
    later.do(lambda: done.append(1))
    with pytest.raises(ZeroDivisionError):
        later.drain()
    later.drain()
    assert done == [1]


def test_a_full_disk_is_said_as_such() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    later = Later()
    later.do(full)
    with pytest.raises(RunError, match="the run's files cannot be written: .*No space left"):
        later.drain()
