"""The published implementation's work, written anew after its rules: what the engines are measured against.

Not its code. It computes what FlagPerf's GLM case computes, in the same steps: every candidate slot in a sequence of
its own padded to S, a mask of ones and zeros that scores are multiplied with, every layer computed twice in training, a
log-softmax over the vocabulary at each position, dropout and AdamW as torch brings them. Weights are those of a `GLM`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_glm.data.collate import PaddedBatch
from lit_glm.model.glm import GLM


def _linear(layer: Any, x: Tensor) -> Tensor:
    """Torch's own, whatever this project takes."""
    return F.linear(x, layer.weight, layer.bias)


class Reference:
    """Scores of a batch and one training step, as published."""

    def __init__(self, glm: GLM, lr: float = 1e-5) -> None:
        self.glm = glm
        plain = [p for name, p in glm.named_parameters() if name.endswith("bias") or "layernorm" in name]
        decayed = [p for name, p in glm.named_parameters() if not (name.endswith("bias") or "layernorm" in name)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.parameters = decayed + plain
        self.optimizer = torch.optim.AdamW(groups, lr=lr)

    def _layer(self, layer: Any, h: Tensor, mask: Tensor, hidden: float, attention: float) -> Tensor:
        N, S, D = h.shape
        heads = layer.attention.heads
        x = layer.input_layernorm(h)
        q, k, v = (
            part.view(N, S, heads, D // heads).permute(0, 2, 1, 3)
            for part in _linear(layer.attention.query_key_value, x).split(D, dim=-1)
        )
        scores = torch.matmul(q, k.transpose(-1, -2) / math.sqrt(D // heads))
        scores = torch.mul(scores, mask) + (-65504.0) * (1.0 - mask)
        probabilities = F.dropout(torch.softmax(scores, dim=-1), attention, layer.training)
        mixed = torch.matmul(probabilities, v).permute(0, 2, 1, 3).contiguous().view(N, S, D)
        h = h + F.dropout(_linear(layer.attention.dense, mixed), hidden, layer.training)
        x = layer.post_attention_layernorm(h)
        x = F.gelu(_linear(layer.mlp.dense_h_to_4h, x), approximate=layer.mlp.approximate)
        x = _linear(layer.mlp.dense_4h_to_h, x)
        return h + F.dropout(x, hidden, layer.training)

    def scores(self, batch: PaddedBatch) -> Tensor:
        """[B, C], of padding slots too."""
        glm, shape = self.glm, self.glm.config
        B, C, S = batch.text.shape
        position, separator = batch.position.view(B * C, 2, S), batch.separator.view(-1, 1)
        mask = torch.tril(torch.ones(1, S, S)).expand(B * C, S, S)
        in_context = (torch.arange(S).view(1, -1) < separator).unsqueeze(1).expand_as(mask)
        mask = mask.masked_fill(in_context, 1.0).unsqueeze(1)
        transformer = glm.transformer
        h = glm.word_embeddings(batch.text.view(-1, S))
        h = h + transformer.position_embeddings(position[:, 0]) + transformer.block_position_embeddings(position[:, 1])
        h = F.dropout(h, shape.hidden_dropout, glm.training)
        for layer in transformer.layers:
            arguments = (layer, h, mask, shape.hidden_dropout, shape.attention_dropout)
            h = checkpoint(self._layer, *arguments, use_reentrant=False) if glm.training else self._layer(*arguments)
        log_probability = F.log_softmax(F.linear(transformer.final_layernorm(h), glm.word_embeddings.weight), dim=-1)
        row, column = torch.arange(B * C).view(-1, 1).expand(-1, S), torch.arange(S).view(1, -1).expand(B * C, -1)
        picked = log_probability[row, column, batch.target.view(B * C, S)]
        return (picked * batch.logit_mask.view(B * C, S)).sum(dim=1).view(B, C)

    def step(self, batch: PaddedBatch) -> float:
        """One update; returns the loss before it."""
        table = self.scores(batch) * batch.loss_mask - 10000.0 * (1.0 - batch.loss_mask)
        loss = F.cross_entropy(table, torch.zeros(len(table), dtype=torch.long))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return float(loss.detach())

    def evaluate(self, batch: PaddedBatch) -> Tensor:
        """[B, C], ten slots at a time."""
        parts = []
        with torch.no_grad():
            for start in range(0, batch.score_shape[1], 10):
                candidates = slice(start, start + 10)
                fields = (batch.text, batch.position, batch.separator, batch.target, batch.logit_mask, batch.loss_mask)
                parts.append(self.scores(PaddedBatch(*(field[:, candidates].contiguous() for field in fields))))
        table = torch.cat(parts, dim=1)
        return table * batch.loss_mask - 1e9 * (1.0 - batch.loss_mask)
