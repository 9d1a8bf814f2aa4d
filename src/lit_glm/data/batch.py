"""Batch types of the scoring modes. Shapes: B examples, C candidate slots, S tokens, G groups, N candidates.

A *context* is the part of a sequence that is attended in both directions: [CLS] passage query-with-[MASK] [PAD].
Candidates of one example whose contexts are identical form a *group*; truncation can make contexts differ.
"""

from dataclasses import dataclass, fields
from typing import Any, List, Optional, Tuple, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound="TensorDataclass")


@dataclass
class TensorDataclass:
    """Batch of tensors that can be moved to a device and pinned, as Lightning and torch's DataLoader require."""

    def to(self: Batch, device: Any, non_blocking: bool = False) -> Batch:
        """Return the batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Batch) -> Batch:
        """Return the batch with all tensors in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self: Batch, change: Any) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, TensorDataclass):
                return value._map(change)
            return change(value) if isinstance(value, torch.Tensor) else value

        return type(self)(**{entry.name: changed(getattr(self, entry.name)) for entry in fields(self)})


@dataclass
class PaddingIndex(TensorDataclass):
    """Indices that pad a packed batch to groups of equal size, for attention in one call.

    K slots per group = the longest context + the largest number of candidate rows of a group. The candidate slots of
    every group begin after those of the longest context.
    """

    gather: Tensor
    """[G, K] row of each slot; row 0 in empty slots, which are masked and never gathered back."""
    scatter: Tensor
    """[T] slot of each row among the G x K slots."""
    gather_candidates: Tensor
    """[G, K - first_candidate] row of each candidate slot, counted among candidate rows."""
    scatter_candidates: Tensor
    """[R] slot of each candidate row, counted among candidate slots."""
    owner: Tensor
    """[G, K] owner of each slot: -2 none, -1 the context, else the index of the candidate."""
    first_candidate: int
    """Number of rows of the longest context: the first candidate slot."""


@dataclass
class PackedBatch(TensorDataclass):
    """A batch without padding: first the rows of all contexts, then those of all candidates.

    Candidates are ordered by group, so that the rows of a group are contiguous in both parts.
    """

    tokens: Tensor
    """[T] token ids, T = context rows + candidate rows."""
    positions: Tensor
    """[T] position in the context; for candidate rows, the position of the [MASK] that they fill."""
    blocks: Tensor
    """[T] block position: 0 in contexts, 1, 2, ... in a candidate."""
    targets: Tensor
    """[R] token to be predicted at each candidate row (R candidate rows)."""
    row_candidate: Tensor
    """[R] index of the candidate (of N) that a row belongs to."""
    slot: Tensor
    """[N] flat index of each candidate in the [B, C] table of scores."""
    context_lengths: List[int]
    """Rows of each group's context; sums to T - R."""
    candidate_rows: List[int]
    """Rows of each group's candidates; sums to R."""
    padding_index: PaddingIndex
    num_examples: int
    num_candidates: int
    """C: the largest number of candidates of an example."""
    answers: Optional[List[Tuple[int, ...]]] = None
    """Correct candidates of each example in evaluation; None in training, where candidate 0 is correct."""
    indices: Tuple[int, ...] = ()
    """Indices of the examples in the dataset."""
    has_padding: bool = False
    """Whether rows, groups and candidates are padded to sizes that recur (`data.pad_to`)."""

    @property
    def score_shape(self) -> Tuple[int, int]:
        """Shape of the table of scores: B, C."""
        return self.num_examples, self.num_candidates


@dataclass
class PaddedBatch(TensorDataclass):
    """Batch of the published workload: every candidate slot is a separate sequence, padded to S."""

    text: Tensor
    """[B, C, S] token ids."""
    position: Tensor
    """[B, C, 2, S] positions and block positions."""
    separator: Tensor
    """[B, C] length of the context (the published arrays call it mask)."""
    target: Tensor
    """[B, C, S] token to be predicted."""
    logit_mask: Tensor
    """[B, C, S] 1 where a token is to be predicted."""
    loss_mask: Tensor
    """[B, C] 1 real candidate, 0 padding slot (a copy of candidate 0)."""
    answers: Optional[List[Tuple[int, ...]]] = None
    indices: Tuple[int, ...] = ()

    @property
    def score_shape(self) -> Tuple[int, int]:
        """Shape of the table of scores: B, C."""
        return int(self.loss_mask.shape[0]), int(self.loss_mask.shape[1])
