"""Batches made ahead are the same batches, in order; errors and endings pass through; evaluation cuts by rows."""

import threading
import time
from itertools import count
from typing import Any, Iterator, List

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.data.datamodule import PrefetchIterator, batch_by_token_budget


@pytest.mark.parametrize("depth", [1, 2, 3, 16, 49, 50, 99])
def test_prefetch_yields_all_items_in_order_on_every_iteration(depth: int) -> None:
    ahead = PrefetchIterator(range(50), depth)
    assert list(ahead) == list(range(50))
    assert list(ahead) == list(range(50))


def test_prefetch_depth_is_bounded() -> None:
    made: List[int] = []

    def source() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    items = iter(PrefetchIterator(source(), 6))
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) == 8  # one taken, six waiting, one in the making
    for taken in range(1, 60):
        assert next(items) == taken
        assert len(made) <= taken + 8  # the one taken, six ready, one in the making
    items.close()  # type: ignore[attr-defined]


def test_prefetch_thread_exits_with_its_iterator() -> None:
    before = set(threading.enumerate())
    items = iter(PrefetchIterator(count()))
    next(items)
    (ours,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "batches ahead_0"]
    items.close()  # type: ignore[attr-defined]
    ours.join(10)
    assert not ours.is_alive()


def test_prefetch_raises_a_source_error_at_its_position() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = iter(PrefetchIterator(source()))
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=40), most=st.integers(1, 120))
def test_evaluation_batches_respect_the_token_budget(rows: Any, most: int) -> None:
    batches = batch_by_token_budget(list(range(len(rows))), np.asarray(rows), most)
    assert [example for batch in batches for example in batch] == list(range(len(rows)))
    sizes = [sum(rows[example] for example in batch) for batch in batches]
    assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, batches))
    # No batch could have taken the next one's first example too.
    assert all(size + rows[batch[0]] > most for size, batch in zip(sizes, batches[1:]))
