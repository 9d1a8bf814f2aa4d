"""Candidate scores: the sum of the log-probabilities of a candidate's tokens, filled in at the [MASK].

Two implementations with equal scores: `shared_context` computes a context once for all its candidates, `published` does
what the published code does. Shapes: B examples, C candidate slots, S tokens, R candidate rows, V vocabulary.
"""

from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.data.collate import PackedBatch, PaddedBatch
from lit_glm.model.attention import DotProductAttention, PaddedAttention, choose_attention_layout
from lit_glm.model.glm import GLM

TRAIN_MASK = -1e4
"""Score of an empty candidate slot in training, as published."""
EVAL_MASK = -1e9
"""Score of an empty candidate slot in evaluation, as published; far enough below any real score never to be chosen."""


def score_shared_context(glm: GLM, batch: PackedBatch) -> Tensor:
    """Score all candidates with one pass over each context.

    Returns:
        [N] scores, candidates in the order of the batch.
    """
    layout = choose_attention_layout(batch, glm.config.hidden_size, DotProductAttention(glm.config.attention, glm.ops))
    h = glm.embed(batch.tokens, batch.positions, batch.blocks)
    h = glm.encode(h, layout, first_row=len(batch.tokens) - len(batch.targets))
    # Only candidate rows reach the head: one row for each token to be predicted.
    log_probability = glm.log_probabilities(h, batch.targets)
    return log_probability.new_zeros(len(batch.slot)).index_add(0, batch.row_candidate, log_probability)


def score_published(glm: GLM, batch: PaddedBatch) -> Tensor:
    """Score every candidate slot in a separate sequence, with log-softmax over the vocabulary at every position.

    Returns:
        [B, C] scores, including padding slots.
    """
    B, C, S = batch.text.shape
    attend = DotProductAttention(glm.config.attention, glm.ops)
    layout = PaddedAttention.from_sequences(batch.separator.reshape(B * C), S, attend)
    position = batch.position.reshape(B * C, 2, S)
    h = glm.embed(batch.text.reshape(-1), position[:, 0].reshape(-1), position[:, 1].reshape(-1))
    h = glm.encode(h, layout)
    log_probability = glm.log_probabilities(h, batch.target.reshape(-1))
    return (log_probability.view(B, C, S) * batch.logit_mask).sum(-1)


def candidate_scores(glm: GLM, batch: Union[PackedBatch, PaddedBatch], empty: float, slice_size: int = 0) -> Tensor:
    """Compute the scores of a batch as a table.

    Args:
        glm: the model.
        batch: its type decides which scoring runs.
        empty: value of the slots without a candidate, `TRAIN_MASK` or `EVAL_MASK`.
        slice_size: number of slots scored at a time (published evaluation: 10); 0: all at once.

    Returns:
        [B, C] float32.
    """
    if isinstance(batch, PackedBatch):
        scores = score_shared_context(glm, batch)
        B, C = batch.score_shape
        if batch.has_padding:  # candidates of the padding have a slot of their own behind the others
            return scores.new_full((B * C + 1,), empty).scatter(0, batch.slot, scores)[:-1].view(B, C)
        return scores.new_full((B * C,), empty).scatter(0, batch.slot, scores).view(B, C)
    slots = batch.score_shape[1]
    step = slice_size or slots
    parts = [score_published(glm, _slice_candidates(batch, start, start + step)) for start in range(0, slots, step)]
    table = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return table * batch.loss_mask + empty * (1 - batch.loss_mask)


def _slice_candidates(batch: PaddedBatch, start: int, stop: int) -> PaddedBatch:
    names = ("text", "position", "separator", "target", "logit_mask", "loss_mask")
    return PaddedBatch(**{name: getattr(batch, name)[:, start:stop] for name in names})


def best_candidates(table: Tensor) -> Tensor:
    """Return the candidate with the highest score, [B, C] -> [B]; C where a score is NaN: none is the best."""
    return table.argmax(dim=1).masked_fill(table.isnan().any(dim=1), table.shape[1])


def candidate_loss(table: Tensor) -> Tensor:
    """Compute the mean cross entropy of choosing candidate 0, the right one in training, [B, C] -> []."""
    return F.cross_entropy(table, torch.zeros(len(table), dtype=torch.long, device=table.device))
