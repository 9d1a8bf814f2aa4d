"""What a batch looks like in each scoring. Shapes: B examples, C candidate slots, S tokens, G groups, N candidates.

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
    """A batch that can be sent to a device and pinned, which is all that Lightning asks of one."""

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
    """Where the rows of a flat batch stand when groups are padded to one size, for attention in one call.

    K places a group = the longest context + the most candidate rows of a group; a group's candidates begin where the
    longest context would end.
    """

    gather: Tensor
    """[G, K] row of each place; row 0 at nobody's places, which are neither seen nor taken."""
    scatter: Tensor
    """[T] place of each row among the G K places."""
    gather_candidates: Tensor
    """[G, candidates' places] row of each place of candidates, counted among candidate rows."""
    scatter_candidates: Tensor
    """[R] place of each candidate row among the places of candidates alone."""
    owner: Tensor
    """[G, K] whose place it is: -2 nobody's, -1 the context's, else the candidate's number."""
    first_candidate: int
    """Rows of the longest context."""


@dataclass
class PackedBatch(TensorDataclass):
    """A batch without padding: first the rows of all contexts, then those of all candidates.

    Candidates are ordered by group, so that the rows of a group stand together in both parts.
    """

    tokens: Tensor
    """[T] token ids, T = context rows + candidate rows."""
    positions: Tensor
    """[T] position in the context; of a candidate's rows, that of the [MASK] which they fill."""
    blocks: Tensor
    """[T] block position: 0 in contexts, 1, 2, ... in a candidate."""
    targets: Tensor
    """[R] the token to be predicted at each candidate row (R candidate rows)."""
    row_candidate: Tensor
    """[R] which of the N candidates a row belongs to."""
    slot: Tensor
    """[N] where a candidate stands in the B x C table of scores, counted row by row."""
    context_lengths: List[int]
    """Rows of each group's context; sums to T - R."""
    candidate_rows: List[int]
    """Rows of each group's candidates; sums to R."""
    padding_index: PaddingIndex
    num_examples: int
    num_candidates: int
    """C: the largest number of candidates of an example."""
    answers: Optional[List[Tuple[int, ...]]] = None
    """Of each example the candidates that are right, in evaluation; in training candidate 0 is."""
    indices: Tuple[int, ...] = ()
    """Which examples of the data set these are."""
    has_padding: bool = False
    """Whether rows, groups and candidates are padded to sizes that recur (`data.pad_to`)."""

    @property
    def score_shape(self) -> Tuple[int, int]:
        """Shape of the table of scores: B, C."""
        return self.num_examples, self.num_candidates


@dataclass
class PaddedBatch(TensorDataclass):
    """The published batch: every candidate slot is a sequence of its own, padded to S."""

    text: Tensor
    """[B, C, S] token ids."""
    position: Tensor
    """[B, C, 2, S] positions and block positions."""
    separator: Tensor
    """[B, C] length of the context (the published arrays call it mask)."""
    target: Tensor
    """[B, C, S] token to be predicted."""
    logit_mask: Tensor
    """[B, C, S] 1 where there is one."""
    loss_mask: Tensor
    """[B, C] 1 real candidate, 0 padding slot (a copy of candidate 0)."""
    answers: Optional[List[Tuple[int, ...]]] = None
    indices: Tuple[int, ...] = ()

    @property
    def score_shape(self) -> Tuple[int, int]:
        """Shape of the table of scores: B, C."""
        return int(self.loss_mask.shape[0]), int(self.loss_mask.shape[1])
