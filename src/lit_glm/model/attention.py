"""Attention: layouts of rows, and one function with two implementations, fused and matmul.

Shapes: T rows, n context rows and m candidate rows of a group, H heads, d = D / H, N sequences, S tokens, G groups of K
places. A context attends to itself in both directions; a candidate's row attends to its context and causally to its
own candidate (GLM, section 2.1).
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import half_softmax, has_fused_attention, scaled_bmm
from lit_glm.data.collate import PackedBatch, PaddingIndex
from lit_glm.errors import InputError
from lit_glm.model.runtime_ops import TORCH_OPS, RuntimeOps, zero_elements_


class MatmulAttention(torch.autograd.Function):
    """Attention by matmuls and softmax; saves the probabilities and the zeros of dropout.

    Where the runtime limits the scores, a few sequences are computed at a time. Backward takes a row's sum of gradient
    x probability from the output, which is shorter than the row (Dao et al. 2022, FlashAttention, appendix B.2), and
    overwrites what it no longer needs. Factors are part of a product (`alpha`), which saves a kernel each.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, forbidden: Optional[Tensor], dropout: float, ops: RuntimeOps
    ) -> Tensor:
        """Compute attention of q [N, H, queries, d], k and v [N, H, keys, d]; `forbidden` is True at hidden keys."""
        N, H, queries, d = q.shape
        ctx.factor, ctx.scale, ctx.dropout = 1.0 / math.sqrt(d), 1.0, dropout
        ctx.sequences = max(1, ops.max_scores_at_once // (H * queries * k.shape[2]))
        q, k, v = (tensor.reshape(N * H, -1, d) for tensor in (q, k, v))
        parts, kept = [], []
        for start in range(0, N, ctx.sequences):
            part = slice(start * H, (start + ctx.sequences) * H)
            scores = scaled_bmm(q[part], k[part].transpose(1, 2), ctx.factor)
            if forbidden is not None:
                hidden = forbidden if len(forbidden) != N else forbidden[start : start + ctx.sequences]
                scores.view(-1, H, queries, k.shape[1]).masked_fill_(hidden, torch.finfo(scores.dtype).min)
            probabilities = half_softmax(scores)
            kept.append(probabilities)
            if dropout:
                zeros, ctx.scale = ops.sample_zeros(probabilities, dropout)
                kept.append(zeros)
                probabilities = _with_zeros(probabilities, zeros)
            parts.append(scaled_bmm(probabilities, v[part], ctx.scale))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(N, H, queries, d)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of q, k and v."""
        q, k, v, out, *kept = ctx.saved_tensors
        N, H, queries, d = grads[0].shape
        grad = grads[0].reshape(N * H, queries, d)
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        saved_per_part = 2 if ctx.dropout else 1
        parts: List[List[Tensor]] = [[], [], []]
        for number, start in enumerate(range(0, N, ctx.sequences)):
            part = slice(start * H, (start + ctx.sequences) * H)
            probabilities, *zeros = kept[number * saved_per_part : (number + 1) * saved_per_part]
            grad_scores, dropped = scaled_bmm(grad[part], v[part].transpose(1, 2), ctx.scale), probabilities
            if zeros:
                zero_elements_(grad_scores, *zeros)
                dropped = _with_zeros(probabilities, *zeros)
            parts[2].append(scaled_bmm(dropped.transpose(1, 2), grad[part], ctx.scale))
            grad_scores.sub_(row_sum[part]).mul_(probabilities)
            parts[0].append(scaled_bmm(grad_scores, k[part], ctx.factor))
            parts[1].append(scaled_bmm(grad_scores.transpose(1, 2), q[part], ctx.factor))
        joined = (grad_parts[0] if len(grad_parts) == 1 else torch.cat(grad_parts) for grad_parts in parts)
        return (*(grad_parts.view(N, H, -1, d) for grad_parts in joined), None, None, None)


def _with_zeros(x: Tensor, zeros: Tensor) -> Tensor:
    return x * zeros if zeros.dtype is torch.bool else zero_elements_(x.clone(), zeros)


def check_attention_available(implementation: str) -> None:
    """Reject an implementation of attention (`model.attention`) that this torch does not have.

    Raises:
        InputError: if the implementation is missing.
    """
    if implementation == "fused" and not has_fused_attention():
        raise InputError(f"model.attention=fused: not available in torch {torch.__version__}; use auto or matmul")


def choose_implementation(implementation: str, device: torch.device, dropout: float) -> str:
    """Choose between torch's fused attention and matmuls; the fused one has no dropout on CPU, and is slower there."""
    if implementation != "auto":
        return implementation
    return "fused" if has_fused_attention() and not (dropout and device.type == "cpu") else "matmul"


class Mask:
    """Attention mask, converted once per batch to the form that an implementation needs, and shared by all layers."""

    def __init__(self, allowed: Tensor) -> None:
        """Store which keys each query sees: boolean, broadcast to [N, H, queries, keys]; each must see one."""
        self._allowed = allowed
        self._forms: Dict[Any, Tensor] = {}

    def tensor_for(self, implementation: str, dtype: torch.dtype, first_query: int) -> Tensor:
        """Return the mask from `first_query` on: additive for fused, boolean (True: forbidden) for matmul."""
        key = (implementation, dtype) if implementation == "fused" else (implementation,)
        if key not in self._forms:
            forbidden = ~self._allowed
            if implementation == "fused":
                zeros = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
                forbidden = zeros.masked_fill_(forbidden, float("-inf"))
            self._forms[key] = forbidden
        return self._forms[key][..., first_query:, :]


@dataclass(frozen=True)
class DotProductAttention:
    """Softmax attention of every head, by one of the implementations."""

    implementation: str = "auto"
    """auto, fused or matmul, as `model.attention`."""
    ops: RuntimeOps = TORCH_OPS

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Mask], dropout: float, first_query: int = 0
    ) -> Tensor:
        """Compute the attention.

        Args:
            q: [N, H, queries, d].
            k: [N, H, keys, d].
            v: [N, H, keys, d].
            mask: which keys each query sees; None: all.
            dropout: share of the probabilities set to zero; 0 outside training.
            first_query: the queries correspond to those of the mask from this one on.

        Returns:
            [N, H, queries, d]. The published code gives forbidden keys a score of -65504; their probability is an
            exact zero there as here.
        """
        implementation = choose_implementation(self.implementation, q.device, dropout)
        form = None if mask is None else mask.tensor_for(implementation, q.dtype, first_query)
        if implementation == "fused":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=form, dropout_p=dropout)
        return MatmulAttention.apply(q, k, v, form, dropout, self.ops)


AttentionLayout = Callable[[Tensor, int, float, bool], Tensor]
"""How rows attend to each other: (queries, keys and values [T, 3 D], H, dropout, whether only the candidates' queries
are computed) -> [T, D], or [R, D] of the candidate rows alone. A `PerGroupAttention` or a `PaddedAttention`, built once
per batch and used by every layer."""


class PerGroupAttention:
    """Attention layout of a batch with one call per group."""

    def __init__(
        self,
        context_lengths: List[int],
        candidate_rows: List[int],
        row_candidate: Tensor,
        attend: DotProductAttention,
    ) -> None:
        """Build the layout.

        Args:
            context_lengths: n of each group.
            candidate_rows: m of each group.
            row_candidate: [R] which candidate each candidate row belongs to.
            attend: attention of one group.
        """
        self.context_lengths, self.candidate_rows, self.attend = context_lengths, candidate_rows, attend
        self.masks: List[Mask] = []
        """Mask of each group, [m, n + m]: which keys its candidate rows see."""
        for n, owner in zip(context_lengths, row_candidate.split(candidate_rows)):
            same_candidate = (owner[:, None] == owner) & _causal(len(owner), owner.device)  # [m, m]
            self.masks.append(Mask(F.pad(same_candidate, (n, 0), value=True)))

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Compute the attention of one layer; see `AttentionLayout`."""
        rows, width = qkv.shape[0], qkv.shape[1] // 3
        # One split for all groups: its backward is one concatenation, where slices would each fill and add T rows.
        parts = qkv.view(rows, 3, heads, width // heads).split(self.context_lengths + self.candidate_rows)
        contexts, candidates = [], []
        groups = len(self.candidate_rows)
        for context, candidate, mask in zip(parts[:groups], parts[groups:], self.masks):
            # [n, 3, H, d] -> three of [1, H, n, d]
            q, k, v = context.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            candidate_q, candidate_k, candidate_v = candidate.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            if not candidates_only:
                contexts.append(self.attend(q, k, v, None, dropout))
            k, v = torch.cat((k, candidate_k), dim=-2), torch.cat((v, candidate_v), dim=-2)
            candidates.append(self.attend(candidate_q, k, v, mask, dropout))
        # [1, H, n, d] -> [n, D]
        return torch.cat([part[0].transpose(0, 1).reshape(part.shape[2], width) for part in contexts + candidates])


@dataclass
class PaddedAttention:
    """Attention layout with one call for all groups, each padded to K slots; rows that are already padded are kept.

    Spends arithmetic on padding to save calls: for accelerators, and for small groups, where calls dominate the cost.
    The published layout is the case of one candidate per group.
    """

    shape: Tuple[int, int]
    """G, K."""
    mask: Mask
    """[G, 1, K, K]."""
    attend: DotProductAttention
    index: Optional[PaddingIndex] = None
    """Index tensors that gather and scatter rows; None: row i is in slot i."""
    unused: Optional[Tensor] = None
    """[G, K] slots without a row; given together with `index`."""

    @classmethod
    def from_index(cls, places: PaddingIndex, attend: DotProductAttention) -> "PaddedAttention":
        """Build the layout of rows without padding, without device synchronisation."""
        owner = places.owner
        same_candidate = (owner[:, :, None] == owner[:, None, :]) & _causal(owner.shape[1], owner.device)
        mask = Mask((same_candidate | (owner == -1)[:, None, :])[:, None])
        return cls((int(owner.shape[0]), int(owner.shape[1])), mask, attend, places, owner == -2)

    @classmethod
    def from_sequences(cls, separator: Tensor, length: int, attend: DotProductAttention) -> "PaddedAttention":
        """Build the layout of N sequences of S tokens.

        Args:
            separator: [N] lengths of the contexts: query i sees key j where j < separator or j <= i.
            length: S.
            attend: attention of all sequences.
        """
        context = torch.arange(length, device=separator.device) < separator[:, None, None]
        return cls((len(separator), length), Mask((_causal(length, separator.device) | context)[:, None]), attend)

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Compute the attention of one layer; see `AttentionLayout`."""
        (groups, length), width = self.shape, qkv.shape[1] // 3
        first = self.index.first_candidate if self.index is not None and candidates_only else 0
        if self.index is not None:
            unused = None if self.unused is None else self.unused[:, first:].reshape(-1, 1)
            scatter = self.index.scatter_candidates if candidates_only else self.index.scatter
            gather = self.index.gather_candidates if candidates_only else self.index.gather
            qkv = _MoveRows.apply(qkv, self.index.gather.view(-1), self.index.scatter, None)
        copies = choose_implementation(self.attend.implementation, qkv.device, dropout) == "matmul"
        q, k, v = _SplitHeads.apply(qkv, groups, length, heads, copies)
        out = self.attend(q[:, :, first:], k, v, self.mask, dropout, first)
        out = out.transpose(1, 2).reshape(-1, width)
        return out if self.index is None else _MoveRows.apply(out, scatter, gather.view(-1), unused)


class _MoveRows(torch.autograd.Function):
    """Gather of rows by index. A slot has at most one row, so gradients are gathered back and never summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Optional[Tensor]) -> Tensor:
        """Return `rows[index]`; `inverse` moves gradients back; `unused` marks input rows without a destination."""
        ctx.save_for_backward(inverse, unused)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inverse, unused = ctx.saved_tensors
        moved = grads[0].index_select(0, inverse)
        return moved if unused is None else moved.masked_fill_(unused, 0.0), None, None, None


class _SplitHeads(torch.autograd.Function):
    """Split into queries, keys and values per head; one copy joins their gradients."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sequences: int, length: int, heads: int, copies: bool) -> Any:
        """Split [N S, 3 D] into three of [N, H, S, d]: views, or contiguous by one copy, as matmuls need them."""
        parts = qkv.view(sequences, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return (parts.contiguous() if copies else parts).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        joined = torch.stack([grad.transpose(1, 2) for grad in grads], dim=2)
        return joined.view(joined.shape[0] * joined.shape[1], -1), None, None, None, None


def choose_attention_layout(batch: PackedBatch, width: int, attend: DotProductAttention) -> AttentionLayout:
    """Choose the attention layout of a packed batch: one call per group, or all groups in one padded call.

    A call costs some tens of microseconds whatever it computes; padding costs arithmetic. On CPU one padded call is
    faster while groups are small (measured by `benchmarks/attention.py`), on other devices nearly always.
    """
    index = batch.padding_index
    if batch.has_padding or index.gather.shape[1] * width <= attend.ops.max_padded_group:
        return PaddedAttention.from_index(index, attend)
    return PerGroupAttention(batch.context_lengths, batch.candidate_rows, batch.row_candidate, attend)


def _causal(size: int, device: torch.device) -> Tensor:
    place = torch.arange(size, device=device)  # `tril_` of booleans takes ten times as long on CPU
    return place[:, None] >= place
