"""Examples to batches, one function a scoring. B examples, C candidate slots, N candidates, S tokens, T rows."""

from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from lit_glm.batches.compact import CompactSplit
from lit_glm.batches.types import FlatBatch, PaddedBatch


def _spans(ends: Any, first: Any, last: Any) -> Any:
    """Lengths of the ranges first..last-1 of an array of ends with a zero in front, one after the other."""
    return np.concatenate([np.diff(ends[a : b + 1]) for a, b in zip(first, last)])


def _counting(lengths: Any) -> Any:
    """0, 1, ... for each of the lengths, one after the other: [2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _answers(split: CompactSplit, indices: Sequence[int]) -> Optional[List[Tuple[int, ...]]]:
    return [split.answers_of(index) for index in indices] if len(split.answers) else None


def flat_batch(split: CompactSplit, indices: Sequence[int]) -> FlatBatch:
    """Collect examples without padding.

    Args:
        split: where they are.
        indices: which ones; B of them.
    """
    index = np.asarray(indices)
    group_first, group_last = split.example_group_end[index], split.example_group_end[index + 1]
    first, last = split.example_candidate_end[index], split.example_candidate_end[index + 1]
    context_lengths = _spans(split.group_context_end, group_first, group_last)
    candidate_lengths = _spans(split.candidate_token_end, first, last)
    group_sizes = np.concatenate([split.group_candidates[a:b] for a, b in zip(group_first, group_last)])
    counts = last - first
    num_candidates = int(counts.max())

    def gather(name: str, ends: Any, begin: Any, end: Any) -> Any:
        array = getattr(split, name)
        return np.concatenate([array[ends[a] : ends[b]] for a, b in zip(begin, end)])

    def each(name: str) -> Any:
        array = getattr(split, name)
        return np.concatenate([array[a:b] for a, b in zip(first, last)])

    inputs = gather("candidate_inputs", split.candidate_token_end, first, last)
    contexts = gather("context_tokens", split.group_context_end, group_first, group_last)
    blocks = np.zeros(len(contexts) + len(inputs), dtype=np.int64)
    blocks[len(contexts) :] = _counting(candidate_lengths) + 1
    group_of_candidate = np.repeat(np.arange(len(group_sizes)), group_sizes)
    rows = np.bincount(group_of_candidate, weights=candidate_lengths, minlength=len(group_sizes))
    return FlatBatch(
        tokens=_tensor(np.concatenate([contexts, inputs])),
        positions=_tensor(
            np.concatenate([_counting(context_lengths), np.repeat(each("candidate_blank"), candidate_lengths)])
        ),
        blocks=_tensor(blocks),
        targets=_tensor(gather("candidate_targets", split.candidate_token_end, first, last)),
        row_candidate=_tensor(np.repeat(np.arange(len(candidate_lengths)), candidate_lengths)),
        slot=_tensor(each("candidate_slot") + np.repeat(np.arange(len(index)) * num_candidates, counts)),
        context_lengths=context_lengths.tolist(),
        candidate_rows=rows.astype(int).tolist(),
        num_examples=len(index),
        num_candidates=num_candidates,
        answers=_answers(split, indices),
        indices=tuple(int(i) for i in indices),
    )


def padded_batch(split: CompactSplit, indices: Sequence[int], num_tokens: int) -> PaddedBatch:
    """Collect examples as the published implementation does.

    Args:
        split: where they are.
        indices: which ones; B of them.
        num_tokens: S, the length that every candidate slot is padded to.
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
                own = slice(split.candidate_token_end[candidate], split.candidate_token_end[candidate + 1])
                inputs = split.candidate_inputs[own]
                stop = n + len(inputs)
                place = (b, int(split.candidate_slot[candidate]))
                text[place][:n], text[place][n:stop] = context, inputs
                target[place][n:stop] = split.candidate_targets[own]
                logit_mask[place][n:stop] = 1
                position[place][0, :n], position[place][0, n:stop] = np.arange(n), split.candidate_blank[candidate]
                position[place][1, n:stop] = np.arange(1, stop - n + 1)
                separator[place], loss_mask[place] = n, 1
                candidate += 1
        for array in (text, target, logit_mask, position, separator):
            array[b, counts[b] :] = array[b, 0]  # empty slots hold copies of candidate 0
    return PaddedBatch(
        text=_tensor(text),
        position=_tensor(position),
        separator=_tensor(separator),
        target=_tensor(target),
        logit_mask=_tensor(logit_mask),
        loss_mask=_tensor(loss_mask),
        answers=_answers(split, indices),
        indices=tuple(int(i) for i in indices),
    )
