"""Attention, over the flat layout and over padded sequences, fused where torch has a fused kernel.

Shapes: T rows, n context rows and m candidate rows of a group, H heads, d = D / H, N sequences, S tokens.
A context attends to itself in both directions; a candidate's row attends to its context and causally to its
own candidate (GLM, section 2.1).
"""

import math
from dataclasses import dataclass
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL_GROUP = 128 * 256  # rows x width of a group up to which one padded call beats a call a group

FUSED = hasattr(F, "scaled_dot_product_attention")  # torch 2.0 and later


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Optional[Tensor], dropout: float) -> Tensor:
    """Softmax attention of every head.

    Args:
        q: [..., queries, d].
        k: [..., keys, d].
        v: [..., keys, d].
        allowed: boolean, broadcast to [..., queries, keys]; each query must see a key. None: all.
        dropout: share of the probabilities set to zero; 0 outside training.

    Returns:
        [..., queries, d]. The published code gives forbidden keys a score of -65504; their probability is an
        exact zero there as here.
    """
    if FUSED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    scores = q @ (k / math.sqrt(q.shape[-1])).transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return probabilities @ v


@dataclass
class FlatPlan:
    """What every layer needs to know of the layout of a batch; computed once a batch."""

    context_lengths: List[int]
    candidate_rows: List[int]
    """Of each group."""
    allowed: List[Tensor]
    """[m, n + m] of each group: which keys its candidate rows see."""

    @classmethod
    def of(cls, context_lengths: List[int], candidate_rows: List[int], row_candidate: Tensor) -> "FlatPlan":
        """Build the plan.

        Args:
            context_lengths: n of each group.
            candidate_rows: m of each group.
            row_candidate: [R] which candidate each candidate row belongs to.
        """
        own = (row_candidate[:, None] == row_candidate[None, :]).tril_()  # [R, R] own candidate, up to oneself
        allowed, start = [], 0
        for n, m in zip(context_lengths, candidate_rows):
            block = own[start : start + m, start : start + m]
            allowed.append(F.pad(block, (n, 0), value=True))
            start += m
        return cls(context_lengths, candidate_rows, allowed)

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer.

        Args:
            qkv: [T, 3 D] queries, keys and values of all rows.
            heads: H.
            dropout: of the probabilities.
            candidates_only: leave out the context's queries (the last layer needs none).

        Returns:
            [T, D], or [R, D] of the candidate rows alone.
        """
        rows, width = qkv.shape[0], qkv.shape[1] // 3
        # One split for all groups: its backward is one concatenation, where slices would each fill and add T rows.
        parts = qkv.view(rows, 3, heads, width // heads).split(self.context_lengths + self.candidate_rows)
        contexts, candidates = [], []
        groups = len(self.candidate_rows)
        for context, candidate, allowed in zip(parts[:groups], parts[groups:], self.allowed):
            # [n, 3, H, d] -> three of [1, H, n, d]
            q, k, v = context.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            candidate_q, candidate_k, candidate_v = candidate.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            if not candidates_only:
                contexts.append(attend(q, k, v, None, dropout))
            candidates.append(
                attend(
                    candidate_q,
                    torch.cat((k, candidate_k), dim=-2),
                    torch.cat((v, candidate_v), dim=-2),
                    allowed,
                    dropout,
                )
            )
        # [1, H, n, d] -> [n, D]
        return torch.cat([part[0].transpose(0, 1).reshape(part.shape[2], width) for part in contexts + candidates])


@dataclass
class GatheredPlan:
    """The flat layout, attention in one call: groups are gathered into a padded tensor and scattered back.

    Wastes arithmetic on padding and saves calls: for small groups, where calls are what costs.
    """

    num_context_rows: int
    gather: Tensor
    """[G, K] row of each place of each group, K = longest context + most candidate rows; T where there is none."""
    scatter: Tensor
    """[T] place of each row among the G K places."""
    allowed: Tensor
    """[G, 1, K, K]."""
    first_candidate: int
    """K - most candidate rows: where candidates begin in a group."""
    scatter_candidates: Tensor
    """[R] place of each candidate row among the places of candidates alone."""

    @classmethod
    def of(cls, context_lengths: List[int], candidate_rows: List[int], row_candidate: Tensor) -> "GatheredPlan":
        """Build the plan; arguments as for `FlatPlan.of`."""
        device = row_candidate.device
        n = torch.tensor(context_lengths)
        m = torch.tensor(candidate_rows)
        most_n, most_m = int(n.max()), int(m.max())
        groups, context_rows, rows = len(n), int(n.sum()), int(n.sum() + m.sum())
        places = most_n + most_m

        def positions(lengths: Tensor, first_place: int) -> Tensor:  # place of each row, contexts or candidates
            owner = torch.repeat_interleave(torch.arange(groups), lengths)
            counting = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths)[owner]
            return owner * places + first_place + counting

        scatter = torch.cat([positions(n, 0), positions(m, most_n)])
        gather = torch.full((groups * places,), rows).scatter_(0, scatter, torch.arange(rows)).view(groups, places)
        gather, scatter = gather.to(device), scatter.to(device)
        # Who owns each place: -2 nobody, -1 the context, else a candidate.
        owner = torch.full((rows + 1,), -1, dtype=torch.long, device=device)
        owner[context_rows:rows] = row_candidate
        owner[rows] = -2
        key = owner[gather]
        allowed = ((key[:, :, None] == key[:, None, :]) & _causal(places, device)) | (key == -1)[:, None, :]
        candidate_place = scatter[context_rows:]
        group = torch.div(candidate_place, places, rounding_mode="floor")
        own_place = candidate_place - group * places - most_n + group * most_m
        return cls(context_rows, gather, scatter, allowed[:, None], most_n, own_place)

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer; as `FlatPlan`."""
        width = qkv.shape[1] // 3
        groups, places = self.gather.shape
        padded = F.pad(qkv, (0, 0, 0, 1)).index_select(0, self.gather.view(-1))
        q, k, v = padded.view(groups, places, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if candidates_only:
            first = self.first_candidate
            out = attend(q[:, :, first:], k, v, self.allowed[:, :, first:], dropout)
            return out.transpose(1, 2).reshape(-1, width).index_select(0, self.scatter_candidates)
        out = attend(q, k, v, self.allowed, dropout)
        return out.transpose(1, 2).reshape(-1, width).index_select(0, self.scatter)


def plan_for(
    context_lengths: List[int], candidate_rows: List[int], row_candidate: Tensor, width: int
) -> Union["FlatPlan", "GatheredPlan"]:
    """Choose how the flat layout attends: one call a group, or all groups in one padded call.

    A call costs some tens of microseconds whatever it computes; padding costs arithmetic. On the processor one padded
    call is ahead while a group is small (`benchmarks/attention.py` has the measurement).

    Args:
        context_lengths: rows of each group's context.
        candidate_rows: rows of each group's candidates.
        row_candidate: [R] which candidate each candidate row belongs to.
        width: D.
    """
    longest = max(context_lengths) + max(candidate_rows)
    plan = GatheredPlan if longest * width <= _SMALL_GROUP else FlatPlan
    return plan.of(context_lengths, candidate_rows, row_candidate)


def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()


@dataclass
class PaddedPlan:
    """The same for sequences that are padded to one length."""

    shape: Tuple[int, int]
    """N, S."""
    allowed: Tensor
    """[N, 1, S, S]: query i sees key j where j < separator or j <= i."""

    @classmethod
    def of(cls, separator: Tensor, length: int) -> "PaddedPlan":
        """Build the plan from the lengths of the contexts, [N]."""
        place = torch.arange(length, device=separator.device)
        causal = place[None, :] <= place[:, None]
        context = place[None, None, :] < separator[:, None, None]
        return cls((len(separator), length), (causal[None] | context)[:, None])

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer: [N S, 3 D] -> [N S, D]."""
        width = qkv.shape[1] // 3
        q, k, v = qkv.view(*self.shape, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v, self.allowed, dropout).transpose(1, 2).reshape(-1, width)
