"""Attention: one function with several kernels behind it, and plans that lay rows out for it.

Shapes: T rows, n context rows and m candidate rows of a group, H heads, d = D / H, N sequences, S tokens.
A context attends to itself in both directions; a candidate's row attends to its context and causally to its
own candidate (GLM, section 2.1).
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.batches.types import FlatBatch, Places
from lit_glm.errors import InputError
from lit_glm.model.dropout import draw

_SMALL_GROUP = 128 * 256  # rows x width of a group up to which one padded call beats a call a group on a processor
_SCORES = 2**21
"""Scores that a processor computes at a time (8 MiB in fp32)."""
_HAS_FUSED = hasattr(F, "scaled_dot_product_attention")  # torch 2.0 and later


def _has_flex() -> bool:
    names = ("torch.nn.attention", "torch.nn.attention.flex_attention")
    return all(importlib.util.find_spec(name) is not None for name in names)


def check_kernel(kernel: str, device: torch.device, training: bool) -> None:
    """Refuse a kernel that is not there before anything is computed.

    Args:
        kernel: `model.attention`: auto, fused (torch's own), matmul (products and a softmax) or flex (FlexAttention).
        device: where it would run.
        training: whether gradients are needed.

    Raises:
        InputError: says what is missing.
    """
    if (kernel == "fused" and not _HAS_FUSED) or (kernel == "flex" and not _has_flex()):
        raise InputError(f"model.attention={kernel}: torch {torch.__version__} has no such kernel; take auto")
    if kernel == "flex" and training and device.type == "cpu":
        raise InputError("model.attention=flex: has no backward pass on processors; it is for cards; take auto")


def choose(kernel: str, device: torch.device, dropout: float) -> str:
    """The kernel that `attend` takes.

    Args:
        kernel: fused, matmul, or auto.
        device: where it runs.
        dropout: of the probabilities; torch's fused kernel for processors has none and would fall back to products.
    """
    if kernel != "auto":
        return kernel
    return "fused" if _HAS_FUSED and not (dropout and device.type == "cpu") else "matmul"


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Optional[Tensor], dropout: float, kernel: str) -> Tensor:
    """Softmax attention of every head.

    Args:
        q: [N, H, queries, d].
        k: [N, H, keys, d].
        v: [N, H, keys, d].
        allowed: boolean, broadcast to [N, H, queries, keys]; each query must see a key. None: all.
        dropout: share of the probabilities set to zero; 0 outside training.
        kernel: auto, fused or matmul.

    Returns:
        [N, H, queries, d]. The published code gives forbidden keys a score of -65504; their probability is an
        exact zero there as here.
    """
    if choose(kernel, q.device, dropout) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    forbidden = None if allowed is None else ~allowed
    out: Tensor = _Products.apply(q, k, v, forbidden, dropout)
    return out


class _Products(torch.autograd.Function):
    """Attention as products and a softmax; keeps the probabilities and one byte an element of a mask.

    On a processor a few sequences at a time, so that their scores fit a cache. The backward pass takes a row's sum of
    gradient x probability from the output, which is shorter than the row (Dao et al. 2022, FlashAttention, appendix
    B.2), and overwrites what it no longer needs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forbidden: Optional[Tensor], dropout: float) -> Tensor:
        N, H, queries, d = q.shape
        keys = k.shape[2]
        ctx.factor, ctx.scale = 1.0 / math.sqrt(d), 1.0
        ctx.sequences = max(1, _SCORES // (H * queries * keys)) if q.device.type == "cpu" else N
        q, k, v = (part.reshape(N * H, -1, d) for part in (q, k, v))
        out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for start in range(0, N, ctx.sequences):
            some = slice(start * H, (start + ctx.sequences) * H)
            scores = torch.bmm(q[some] * ctx.factor, k[some].transpose(1, 2))
            if forbidden is not None:
                own = forbidden if len(forbidden) != N else forbidden[start : start + ctx.sequences]
                scores.view(-1, H, queries, keys).masked_fill_(own, torch.finfo(scores.dtype).min)
            probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
            keep, ctx.scale = draw(probabilities, dropout) if dropout else (None, 1.0)
            torch.bmm(probabilities if keep is None else probabilities * keep, v[some], out=out[some])
            kept += [probabilities, keep]
        if dropout:
            out.mul_(ctx.scale)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(N, H, queries, d)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, *kept = ctx.saved_tensors
        N, H, queries, d = grads[0].shape
        grad = grads[0].reshape(N * H, queries, d)
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        if kept[1] is not None:
            grad = grad * ctx.scale
        grad_q, grad_k, grad_v = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))
        for number in range(len(kept) // 2):
            some = slice(number * ctx.sequences * H, (number + 1) * ctx.sequences * H)
            probabilities, keep = kept[2 * number : 2 * number + 2]
            dropped = probabilities if keep is None else probabilities * keep
            torch.bmm(dropped.transpose(1, 2), grad[some], out=grad_v[some])
            grad_scores = torch.bmm(grad[some], v[some].transpose(1, 2))
            if keep is not None:
                grad_scores.mul_(keep)
            grad_scores.sub_(row_sum[some]).mul_(probabilities)
            torch.bmm(grad_scores, k[some], out=grad_q[some])
            torch.bmm(grad_scores.transpose(1, 2), q[some], out=grad_k[some])
        grad_q.mul_(ctx.factor)
        grad_k.mul_(ctx.factor)
        return (*(part.view(N, H, -1, d) for part in (grad_q, grad_k, grad_v)), None, None)


@dataclass
class FlatPlan:
    """What every layer needs to know of the layout of a batch; computed once a batch."""

    context_lengths: List[int]
    candidate_rows: List[int]
    """Of each group."""
    allowed: List[Tensor]
    """[m, n + m] of each group: which keys its candidate rows see."""
    kernel: str

    @classmethod
    def of(
        cls, context_lengths: List[int], candidate_rows: List[int], row_candidate: Tensor, kernel: str = "auto"
    ) -> "FlatPlan":
        """Build the plan.

        Args:
            context_lengths: n of each group.
            candidate_rows: m of each group.
            row_candidate: [R] which candidate each candidate row belongs to.
            kernel: for `attend`.
        """
        own = row_candidate[:, None] == row_candidate  # [R, R]
        own &= _causal(len(row_candidate), row_candidate.device)
        allowed, start = [], 0
        for n, m in zip(context_lengths, candidate_rows):
            block = own[start : start + m, start : start + m]
            allowed.append(F.pad(block, (n, 0), value=True))
            start += m
        return cls(context_lengths, candidate_rows, allowed, kernel)

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
                contexts.append(attend(q, k, v, None, dropout, self.kernel))
            candidates.append(
                attend(
                    candidate_q,
                    torch.cat((k, candidate_k), dim=-2),
                    torch.cat((v, candidate_v), dim=-2),
                    allowed,
                    dropout,
                    self.kernel,
                )
            )
        # [1, H, n, d] -> [n, D]
        return torch.cat([part[0].transpose(0, 1).reshape(part.shape[2], width) for part in contexts + candidates])


@dataclass
class GatheredPlan:
    """The flat layout, attention in one call: groups are gathered into a padded tensor and scattered back.

    Wastes arithmetic on padding and saves calls: for small groups, where calls are what costs.
    """

    places: Places
    allowed: Tensor
    """[G, 1, K, K]."""
    kernel: str

    @classmethod
    def of(cls, places: Places, kernel: str = "auto") -> "GatheredPlan":
        """Build the plan; the kernel is that of `attend`. Reads nothing back from the device."""
        owner = places.owner
        own = (owner[:, :, None] == owner[:, None, :]) & _causal(owner.shape[1], owner.device)
        return cls(places, (own | (owner == -1)[:, None, :])[:, None], kernel)

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer; as `FlatPlan`."""
        width = qkv.shape[1] // 3
        places = self.places
        padded = F.pad(qkv, (0, 0, 0, 1)).index_select(0, places.gather.view(-1))
        q, k, v = padded.view(*places.gather.shape, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if candidates_only:
            first = places.first_candidate
            out = attend(q[:, :, first:], k, v, self.allowed[:, :, first:], dropout, self.kernel)
            return out.transpose(1, 2).reshape(-1, width).index_select(0, places.scatter_candidates)
        out = attend(q, k, v, self.allowed, dropout, self.kernel)
        return out.transpose(1, 2).reshape(-1, width).index_select(0, places.scatter)


@dataclass
class FlexPlan:
    """The flat layout in one call of FlexAttention: blocks of the T x T table that nobody sees are never computed.

    For cards. Its shapes are marked dynamic, so that steps of other lengths do not compile anew. It has no dropout of
    the probabilities, and on processors no backward pass.
    """

    all_rows: Any
    """Block mask of the layers."""
    candidates: Any
    """Block mask of the last layer: queries of the candidate rows alone."""
    num_context_rows: int

    @classmethod
    def of(
        cls, context_lengths: List[int], candidate_rows: List[int], row_candidate: Tensor, kernel: str = "flex"
    ) -> "FlexPlan":
        """Build the plan; arguments as for `FlatPlan.of`."""
        from torch.nn.attention.flex_attention import create_block_mask

        device = row_candidate.device
        lengths = torch.tensor(context_lengths + candidate_rows, device=device)
        places = torch.arange(len(context_lengths), device=device).repeat(2)
        group = torch.repeat_interleave(places, lengths, output_size=sum(context_lengths) + len(row_candidate))
        contexts, rows = sum(context_lengths), len(group)
        owner = F.pad(row_candidate, (contexts, 0), value=-1)

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (owner[query] == owner[key]) & (key <= query)
            return (group[query] == group[key]) & ((owner[key] < 0) | own)

        def candidate_sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(_batch, _head, query + contexts, key)

        return cls(
            create_block_mask(sees, None, None, rows, rows, device=device.type),
            create_block_mask(candidate_sees, None, None, rows - contexts, rows, device=device.type),
            contexts,
        )

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer; as `FlatPlan`."""
        assert dropout == 0.0, "FlexAttention has no dropout"  # refused when the configuration is read
        rows, width = qkv.shape[0], qkv.shape[1] // 3
        q, k, v = qkv.view(rows, 3, heads, width // heads).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        first = self.num_context_rows if candidates_only else 0
        mask = self.candidates if candidates_only else self.all_rows
        out = _flex(q.device.type)(q[:, :, first:], k, v, block_mask=mask)
        return out[0].transpose(0, 1).reshape(rows - first, width)


_compiled: Any = None


def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled
    if device == "cpu":
        return flex_attention  # for tests: products and a softmax
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled


def plan_for(batch: FlatBatch, width: int, kernel: str) -> Union[FlatPlan, GatheredPlan, FlexPlan]:
    """Choose how the flat layout attends: one call a group, all groups in one padded call, or a block mask.

    A call costs some tens of microseconds whatever it computes; padding costs arithmetic. On a processor one padded
    call is ahead while a group is small (`benchmarks/attention.py` has the measurement), on a card nearly always.

    Args:
        batch: what is attended.
        width: D.
        kernel: `model.attention`.
    """
    small = batch.places.gather.shape[1] * width <= _SMALL_GROUP or batch.places.gather.device.type != "cpu"
    if kernel != "flex" and small:
        return GatheredPlan.of(batch.places, kernel)
    plan: Any = FlexPlan if kernel == "flex" else FlatPlan
    return plan.of(batch.context_lengths, batch.candidate_rows, batch.row_candidate, kernel)


def _causal(size: int, device: torch.device) -> Tensor:
    place = torch.arange(size, device=device)  # a processor's tril_ of booleans takes ten times as long
    return place[:, None] >= place


@dataclass
class PaddedPlan:
    """The same for sequences that are padded to one length."""

    shape: Tuple[int, int]
    """N, S."""
    allowed: Tensor
    """[N, 1, S, S]: query i sees key j where j < separator or j <= i."""
    kernel: str

    @classmethod
    def of(cls, separator: Tensor, length: int, kernel: str = "auto") -> "PaddedPlan":
        """Build the plan from the lengths of the contexts, [N]; the kernel is that of `attend`."""
        context = torch.arange(length, device=separator.device) < separator[:, None, None]
        return cls((len(separator), length), (_causal(length, separator.device) | context)[:, None], kernel)

    def __call__(self, qkv: Tensor, heads: int, dropout: float, candidates_only: bool) -> Tensor:
        """Attention of one layer: [N S, 3 D] -> [N S, D]."""
        width = qkv.shape[1] // 3
        q, k, v = qkv.view(*self.shape, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v, self.allowed, dropout, self.kernel).transpose(1, 2).reshape(-1, width)
