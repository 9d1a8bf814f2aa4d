"""Distributed batch sampler. The examples of step k are a pure function of (seed, k), so that resuming needs only k.

The order is that of torch's DistributedSampler (shuffle, `set_epoch(0, 1, 2, ...)`, last short batch kept), as in the
published implementation.
"""

import heapq
import itertools
from typing import Any, Iterator, List, Optional

import numpy as np
import torch
from torch.utils.data import Sampler

from lit_glm.config.schema import TrainConfig


class InfiniteDistributedBatchSampler(Sampler):
    """Batch sampler of one rank that repeats epochs without end."""

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start: int = 0,
        lengths: Optional[Any] = None,
        longest_first_rows: Optional[Any] = None,
    ) -> None:
        """Configure the order.

        Args:
            num_examples: N.
            batch_size: examples per rank and step.
            rank: this rank.
            world_size: number of ranks.
            seed: seed of the shuffles, to which the epoch is added.
            start: steps that are done already.
            lengths: [N] rows of each example, to give every rank of a global batch an equal share; None: as published.
            longest_first_rows: [N] rows by which the first step takes the longest examples; None: shuffled order.
        """
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._seed = seed
        self._start = start
        self._lengths = lengths if world_size > 1 else None
        self._longest_first_rows = longest_first_rows
        self._epoch_order: Any = (-1, None)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, including a partial last one."""
        per_rank = -(-self._num_examples // self._world_size)
        return -(-per_rank // self._batch_size)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, of a step counted from 1."""
        return (step - 1) // self.steps_per_epoch

    def samples_until(self, step: int) -> int:
        """Return the number of examples of all ranks in steps 1..step; the last batches of an epoch may be partial."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        total = -(-self._num_examples // self._world_size) * self._world_size
        return epochs * total + min(rest * self._batch_size * self._world_size, total)

    def __iter__(self) -> Iterator[List[int]]:
        for step in itertools.count(self._start + 1):
            yield self.rank_batches(step)[self._rank]

    def epoch_order(self, epoch: int) -> Any:
        """Return the examples of an epoch, in the order in which all ranks together take them."""
        generator = torch.Generator()
        generator.manual_seed(self._seed + epoch)
        order = torch.randperm(self._num_examples, generator=generator).numpy()
        if epoch == 0 and self._longest_first_rows is not None:
            most = np.argsort(-self._longest_first_rows, kind="stable")[: self._batch_size * self._world_size]
            order = np.concatenate([most, order[~np.isin(order, most)]])
        total = -(-self._num_examples // self._world_size) * self._world_size
        return np.resize(order, total)  # wraps around to give every rank the same number

    def rank_batches(self, step: int) -> List[List[int]]:
        """Return the examples of every rank in a step counted from 1."""
        epoch, k = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch_order[0]:
            self._epoch_order = (epoch, self.epoch_order(epoch))
        width = self._batch_size * self._world_size
        batch = self._epoch_order[1][k * width : (k + 1) * width]
        if self._lengths is None:
            return [[int(i) for i in batch[rank :: self._world_size]] for rank in range(self._world_size)]
        return balance_by_length(batch, self._lengths[batch], self._world_size)


def build_train_sampler(
    config: TrainConfig, split: Any, rank: int = 0, start: int = 0
) -> InfiniteDistributedBatchSampler:
    """Build the sampler of a run's training batches."""
    data = config.data
    rows = split.example_rows
    if data.longest_first and config.scoring.name == "published":
        rows = np.diff(split.example_candidate_end)
    return InfiniteDistributedBatchSampler(
        len(split),
        config.bs,
        rank,
        config.topology.world_size,
        data.shuffle_seed,
        start,
        split.example_rows if data.balance_ranks else None,
        rows if data.longest_first else None,
    )


def balance_by_length(examples: Any, lengths: Any, world_size: int) -> List[List[int]]:
    """Distribute examples over ranks: an equal number each, and nearly equal total lengths.

    Greedy, longest first, each to the rank with the smallest total that still has room. All ranks compute the same.

    Args:
        examples: a multiple of `world_size`.
        lengths: length of each example.
        world_size: number of ranks.
    """
    room = len(examples) // world_size
    shares: List[List[int]] = [[] for _ in range(world_size)]
    heap = [(0, rank) for rank in range(world_size)]
    for place in np.argsort(-np.asarray(lengths), kind="stable"):
        load, rank = heapq.heappop(heap)
        shares[rank].append(int(examples[place]))
        if len(shares[rank]) < room:
            heapq.heappush(heap, (load + int(lengths[place]), rank))
    return shares
