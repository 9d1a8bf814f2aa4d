from typing import List

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from lit_glm.data.sampler import InfiniteDistributedBatchSampler, balance_by_length


def take(batches: InfiniteDistributedBatchSampler, count: int) -> List[List[int]]:
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2))
def test_sampler_order_matches_torch_distributed_sampler(examples: int, batch_size: int, world: int, seed: int) -> None:
    for rank in range(world):
        ours = InfiniteDistributedBatchSampler(examples, batch_size, rank, world, seed)
        expected = []
        sampler = DistributedSampler(range(examples), world, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        for epoch in range(3):
            sampler.set_epoch(epoch)
            order = list(sampler)
            expected += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        assert take(ours, len(expected)) == expected


@given(st.integers(1, 30), st.integers(0, 60))
def test_sampler_continues_the_order_from_any_start(examples: int, start: int) -> None:
    whole = take(InfiniteDistributedBatchSampler(examples, 4, 0, 1, 0), start + 5)
    assert take(InfiniteDistributedBatchSampler(examples, 4, 0, 1, 0, start=start), 5) == whole[start:]


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 9), world=st.integers(1, 4), step=st.integers(0, 30))
def test_number_of_samples_is_that_of_the_batches(examples: int, batch_size: int, world: int, step: int) -> None:
    """Throughput is computed from it; a partial batch counts with the examples that it has."""
    sampler = InfiniteDistributedBatchSampler(examples, batch_size, 0, world, seed=3)
    computed = sum(len(batch) for done in range(1, step + 1) for batch in sampler.rank_batches(done))
    assert sampler.samples_until(step) == computed


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 3))
def test_longest_examples_are_those_of_the_first_step(rows: List[int], batch_size: int, world: int) -> None:
    """A search for the largest bs needs them first; the first epoch still has each example."""
    lengths = np.array(rows)
    sampler = InfiniteDistributedBatchSampler(len(rows), batch_size, 0, world, seed=3, longest_first_rows=lengths)
    first = [example for batch in sampler.rank_batches(1) for example in batch]
    of_longest = sorted(rows, reverse=True)[: batch_size * world]
    assert sorted(lengths[np.unique(first)], reverse=True) == of_longest
    assert sorted(np.unique(sampler.epoch_order(0))) == list(range(len(rows)))


def test_epochs() -> None:
    batches = InfiniteDistributedBatchSampler(10, 4, 0, 1, 0)
    assert [batches.epoch_of(step) for step in (1, 3, 4, 7)] == [0, 0, 1, 2]


@given(st.lists(st.integers(1, 500), min_size=2, max_size=24), st.integers(2, 4))
def test_balanced_shares_hold_each_example_once_in_equal_numbers(lengths: List[int], world: int) -> None:
    lengths = lengths[: len(lengths) // world * world] or [1] * world
    examples = np.arange(100, 100 + len(lengths))
    shares = balance_by_length(examples, np.asarray(lengths), world)
    assert sorted(sum(shares, [])) == examples.tolist()
    assert {len(share) for share in shares} == {len(lengths) // world}


def test_balanced_shares_are_nearly_equal() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, 64)
    loads = [sum(lengths[list(share)]) for share in balance_by_length(np.arange(64), lengths, 4)]
    assert max(loads) / (sum(loads) / 4) < 1.02


@pytest.mark.parametrize("rank", [0, 1])
def test_balance_keeps_the_global_batch(rank: int) -> None:
    lengths = np.random.default_rng(0).integers(50, 500, 30)
    plain = [take(InfiniteDistributedBatchSampler(30, 4, r, 2, 0), 4) for r in range(2)]
    dealt = [take(InfiniteDistributedBatchSampler(30, 4, r, 2, 0, lengths=lengths), 4) for r in range(2)]
    for step in range(4):
        assert sorted(plain[0][step] + plain[1][step]) == sorted(dealt[0][step] + dealt[1][step])
        assert len(dealt[rank][step]) == len(plain[rank][step])
