"""The flat layout in one call of FlexAttention, for cards. Shapes: T rows, D hidden, H heads."""

import importlib.util
from dataclasses import dataclass
from typing import Any, List

import torch
import torch.nn.functional as F
from torch import Tensor


def has_flex() -> bool:
    """Whether this torch has FlexAttention."""
    names = ("torch.nn.attention", "torch.nn.attention.flex_attention")
    return all(importlib.util.find_spec(name) is not None for name in names)


def compiles(device: torch.device) -> bool:
    """Whether a compiled function is one: what torch traces knows it."""

    def asked(x: Tensor) -> Tensor:
        return x + (1.0 if torch.compiler.is_compiling() else 0.0)

    return bool(torch.compile(asked, backend="eager")(torch.zeros((), device=device)) == 1.0)


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
        """Build the plan; arguments as for `lit_glm.model.attention.FlatPlan.of`."""
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
        """Attention of one layer: [T, 3 D] -> [T, D], or [R, D] of the candidate rows alone."""
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
