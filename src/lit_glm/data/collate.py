"""Batches and the functions that collate examples into them, one per scoring mode.

A *context* is the part of a sequence that is attended in both directions: [CLS] passage query-with-[MASK] [PAD].
Candidates of one example whose contexts are identical form a *group*; truncation can make contexts differ. Shapes:
B examples, C candidate slots, S tokens, G groups, N candidates, T rows, R candidate rows.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_glm.data.memmap_dataset import MemmapDataset

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

    def _map(self: Batch, function: Any) -> Batch:
        def apply(value: Any) -> Any:
            if isinstance(value, TensorDataclass):
                return value._map(function)
            return function(value) if isinstance(value, torch.Tensor) else value

        return type(self)(**{entry.name: apply(getattr(self, entry.name)) for entry in fields(self)})


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
    first_equal: Optional[List[List[int]]] = None
    """In evaluation: for each candidate of each example, the first one with the same tokens (see `_first_equal`)."""
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
    first_equal: Optional[List[List[int]]] = None
    indices: Tuple[int, ...] = ()

    @property
    def score_shape(self) -> Tuple[int, int]:
        """Shape of the table of scores: B, C."""
        return int(self.loss_mask.shape[0]), int(self.loss_mask.shape[1])


_ALIGNED = 8
"""Slots per group are a multiple of this: fused attention kernels copy an additive mask of other strides."""


def _ranges_to_indices(starts: Any, ends: Any) -> Any:
    """Concatenate the ranges starts..ends-1: [5, 1], [7, 2] -> [5, 6, 1]."""
    lengths = ends - starts
    stops = np.cumsum(lengths)
    return np.arange(stops[-1]) + np.repeat(starts - stops + lengths, lengths)


def _to_int64_tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _correct_candidates(split: MemmapDataset, indices: Sequence[int]) -> Optional[List[Tuple[int, ...]]]:
    return [split.answers_of(index) for index in indices] if len(split.answers) else None


def _first_equal(split: MemmapDataset, indices: Sequence[int]) -> Optional[List[List[int]]]:
    """Find candidates with the same tokens in the same context, as two spellings of a name that differ in case.

    Their scores are equal in exact arithmetic, but on a device they may differ in the last bit; which of them is chosen
    must not depend on that.

    Returns:
        For each candidate of each example, the first candidate that equals it, itself if there is none; None in
        training.
    """
    if not len(split.answers):
        return None
    first_equal_of_examples = []
    for index in indices:
        groups = np.arange(split.example_group_end[index], split.example_group_end[index + 1])
        candidates = slice(split.example_candidate_end[index], split.example_candidate_end[index + 1])
        ends = split.candidate_token_end[candidates.start : candidates.stop + 1].tolist()
        # A group has one context, and its candidates are stored in the order of their slots: `seen` has the first.
        group_of = np.repeat(groups, split.group_candidates[groups]).tolist()
        first_slots: Dict[Tuple[int, bytes], int] = {}
        first_equal = [0] * (candidates.stop - candidates.start)
        for slot, group, start, end in zip(split.candidate_slot[candidates].tolist(), group_of, ends, ends[1:]):
            first_equal[slot] = first_slots.setdefault((group, split.candidate_targets[start:end].tobytes()), slot)
        first_equal_of_examples.append(first_equal)
    return first_equal_of_examples


def collate_packed(split: MemmapDataset, indices: Sequence[int]) -> PackedBatch:
    """Collate examples without padding.

    Args:
        split: the dataset.
        indices: [B] indices of the examples.
    """
    # Whole arrays only: a Python loop over the examples would compete with the training loop for the GIL.
    index = np.asarray(indices)
    groups = _ranges_to_indices(split.example_group_end[index], split.example_group_end[index + 1])
    context_start, context_end = split.group_context_end[groups], split.group_context_end[groups + 1]
    context_lengths = context_end - context_start
    contexts = _ranges_to_indices(context_start, context_end)

    first, last = split.example_candidate_end[index], split.example_candidate_end[index + 1]
    candidates, counts = _ranges_to_indices(first, last), last - first
    num_candidates = int(counts.max())
    start, end = split.candidate_token_end[candidates], split.candidate_token_end[candidates + 1]
    lengths = end - start
    rows = _ranges_to_indices(start, end)

    tokens, positions, blocks = np.zeros((3, len(contexts) + len(rows)), dtype=np.int64)
    candidate_part = slice(len(contexts), None)
    tokens[: len(contexts)], tokens[candidate_part] = split.context_tokens[contexts], split.candidate_inputs[rows]
    positions[: len(contexts)] = contexts - np.repeat(context_start, context_lengths)
    positions[candidate_part] = np.repeat(split.candidate_blank[candidates], lengths)
    blocks[candidate_part] = rows - np.repeat(start - 1, lengths)
    row_candidate = np.repeat(np.arange(len(candidates)), lengths)
    group_sizes = split.group_candidates[groups]
    candidate_rows = np.add.reduceat(lengths, np.cumsum(group_sizes) - group_sizes)  # every group has a candidate
    return PackedBatch(
        tokens=_to_int64_tensor(tokens),
        positions=_to_int64_tensor(positions),
        blocks=_to_int64_tensor(blocks),
        targets=_to_int64_tensor(split.candidate_targets[rows]),
        row_candidate=_to_int64_tensor(row_candidate),
        slot=_to_int64_tensor(
            split.candidate_slot[candidates] + np.repeat(np.arange(len(index)) * num_candidates, counts)
        ),
        context_lengths=context_lengths.tolist(),
        candidate_rows=candidate_rows.tolist(),
        padding_index=build_padding_index(context_lengths, candidate_rows, row_candidate),
        num_examples=len(index),
        num_candidates=num_candidates,
        answers=_correct_candidates(split, indices),
        first_equal=_first_equal(split, indices),
        indices=tuple(index.tolist()),
    )


def pad_packed(batch: PackedBatch, pad_to: int) -> PackedBatch:
    """Pad a batch so that few different shapes occur: for runtimes that compile anew for each shape.

    Contexts get the smallest of `pad_to`, 2 `pad_to`, 4 `pad_to`, ... rows that holds the longest; a batch gets B,
    2 B, 4 B, ... groups. A group gets 64 x 2^l candidate rows and an example 16 x 2^l candidates, with the smallest l
    that suffices for both. Padding is neither attended to nor scored.

    Args:
        batch: without padding.
        pad_to: fewest rows of a context.
    """
    groups, B, C = len(batch.context_lengths), batch.num_examples, batch.num_candidates
    n, m = np.asarray(batch.context_lengths), np.asarray(batch.candidate_rows)
    max_context_rows = pad_to * 2 ** _num_doublings(int(n.max()), pad_to)
    level = max(_num_doublings(int(m.max()), 64), _num_doublings(C, 16))
    max_candidate_rows, slots, all_groups = 64 * 2**level, 16 * 2**level, B * 2 ** _num_doublings(groups, B)
    dummy = B * slots  # candidate that all padding belongs to; its score is dropped
    starts = np.arange(groups)
    contexts = _ranges_to_indices(starts * max_context_rows, starts * max_context_rows + n)
    rows = _ranges_to_indices(starts * max_candidate_rows, starts * max_candidate_rows + m)
    first = all_groups * max_context_rows
    places = np.concatenate([contexts, first + rows])

    def padded(tensor: Tensor, destination: Any, size: int, fill: int = 0) -> Tensor:
        return torch.full((size,), fill, dtype=tensor.dtype).index_copy_(0, torch.from_numpy(destination), tensor)

    size = all_groups * (max_context_rows + max_candidate_rows)
    row_candidate = padded(batch.row_candidate, rows, all_groups * max_candidate_rows, dummy)
    ones = np.ones(all_groups, np.int64)
    index = build_padding_index(ones * max_context_rows, ones * max_candidate_rows, row_candidate.numpy())
    is_padding = np.ones((all_groups, max_context_rows), dtype=bool)
    is_padding[:groups] = np.arange(max_context_rows) >= n[:, None]
    index.owner[:, :max_context_rows].masked_fill_(torch.from_numpy(is_padding), -2)
    index.owner.masked_fill_(index.owner == dummy, -2)
    slot = batch.slot // C * slots + batch.slot % C
    return replace(
        batch,
        tokens=padded(batch.tokens, places, size),
        positions=padded(batch.positions, places, size),
        blocks=padded(batch.blocks, places, size),
        targets=padded(batch.targets, rows, all_groups * max_candidate_rows),
        row_candidate=row_candidate,
        slot=torch.cat([slot, slot.new_full((dummy + 1 - len(slot),), dummy)]),
        context_lengths=[max_context_rows] * all_groups,
        candidate_rows=[max_candidate_rows] * all_groups,
        padding_index=index,
        num_candidates=slots,
        has_padding=True,
    )


def _num_doublings(count: int, least: int) -> int:
    """Return how often `least` must be doubled to hold `count`."""
    return max(0, math.ceil(math.log2(count / least)))


def build_padding_index(context_lengths: Any, candidate_rows: Any, row_candidate: Any) -> PaddingIndex:
    """Build the index that pads a packed batch to groups of equal size.

    Args:
        context_lengths: [G] rows of each group's context.
        candidate_rows: [G] rows of each group's candidates.
        row_candidate: [R] candidate of each candidate row.
    """
    groups = len(context_lengths)
    max_context_rows, max_candidate_rows = int(context_lengths.max()), int(candidate_rows.max())
    max_candidate_rows += -(max_context_rows + max_candidate_rows) % _ALIGNED
    first = np.arange(groups) * (max_context_rows + max_candidate_rows)
    contexts = _ranges_to_indices(first, first + context_lengths)
    candidates = _ranges_to_indices(first + max_context_rows, first + max_context_rows + candidate_rows)
    scatter = np.concatenate([contexts, candidates])
    gather = np.zeros(groups * (max_context_rows + max_candidate_rows), np.int64)
    gather[scatter] = np.arange(len(scatter))
    owner = np.full(len(gather), -2)
    owner[contexts], owner[candidates] = -1, row_candidate
    own_first = np.arange(groups) * max_candidate_rows
    return PaddingIndex(
        gather=_to_int64_tensor(gather.reshape(groups, -1)),
        scatter=_to_int64_tensor(scatter),
        gather_candidates=_to_int64_tensor(
            np.maximum(0, gather.reshape(groups, -1)[:, max_context_rows:] - len(contexts))
        ),
        scatter_candidates=_to_int64_tensor(_ranges_to_indices(own_first, own_first + candidate_rows)),
        owner=_to_int64_tensor(owner.reshape(groups, -1)),
        first_candidate=max_context_rows,
    )


def collate_padded(split: MemmapDataset, indices: Sequence[int], num_tokens: int) -> PaddedBatch:
    """Collate examples as the published implementation does.

    Args:
        split: the dataset.
        indices: [B] indices of the examples.
        num_tokens: S, the length to which every candidate slot is padded.
    """
    counts = np.diff(split.example_candidate_end)[np.asarray(indices)]
    shape = (len(counts), int(counts.max()), num_tokens)
    text, target, logit_mask = (np.zeros(shape, np.int64) for _ in range(3))
    position = np.zeros((*shape[:2], 2, num_tokens), np.int64)
    separator, loss_mask = np.zeros(shape[:2], np.int64), np.zeros(shape[:2], np.int64)
    for b, index in enumerate(indices):
        candidate = int(split.example_candidate_end[index])
        for group in range(split.example_group_end[index], split.example_group_end[index + 1]):
            context = split.context_tokens[split.group_context_end[group] : split.group_context_end[group + 1]]
            n = len(context)
            for _ in range(split.group_candidates[group]):
                token_range = slice(split.candidate_token_end[candidate], split.candidate_token_end[candidate + 1])
                inputs = split.candidate_inputs[token_range]
                stop = n + len(inputs)
                place = (b, int(split.candidate_slot[candidate]))
                text[place][:n], text[place][n:stop] = context, inputs
                target[place][n:stop] = split.candidate_targets[token_range]
                logit_mask[place][n:stop] = 1
                position[place][0, :n], position[place][0, n:stop] = np.arange(n), split.candidate_blank[candidate]
                position[place][1, n:stop] = np.arange(1, stop - n + 1)
                separator[place], loss_mask[place] = n, 1
                candidate += 1
        for array in (text, target, logit_mask, position, separator):
            array[b, counts[b] :] = array[b, 0]  # empty slots hold copies of candidate 0
    return PaddedBatch(
        text=_to_int64_tensor(text),
        position=_to_int64_tensor(position),
        separator=_to_int64_tensor(separator),
        target=_to_int64_tensor(target),
        logit_mask=_to_int64_tensor(logit_mask),
        loss_mask=_to_int64_tensor(loss_mask),
        answers=_correct_candidates(split, indices),
        first_equal=_first_equal(split, indices),
        indices=tuple(int(i) for i in indices),
    )
