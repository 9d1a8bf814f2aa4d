"""GLM in plain torch: embeddings with two-dimensional positions, pre-norm layers, a head tied to the word embedding.

Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (ACL 2022). Parameter names
and shapes are those of the published checkpoint. Shapes: T rows, D hidden, V vocabulary.
"""

import math
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_glm.config.schema import ModelConfig
from lit_glm.model.attention import AttentionLayout
from lit_glm.model.compile import compiled, traceable
from lit_glm.model.lm_head import log_probabilities
from lit_glm.model.runtime_ops import TORCH_OPS, RuntimeOps


class Dropout(nn.Module):
    """Dropout in training by the runtime's function; adds the result to a residual."""

    def __init__(self, p: float, ops: RuntimeOps) -> None:
        super().__init__()
        self.p, self._dropout = p, ops.dropout

    def forward(self, x: Tensor, onto: Optional[Tensor] = None) -> Tensor:
        """Apply dropout, [T, D] -> [T, D], and add the result to `onto` if given."""
        return self._dropout(x, self.p if self.training else 0.0, onto)


class Linear(nn.Linear):
    """Linear layer whose product is computed by the runtime's function."""

    def __init__(self, inputs: int, outputs: int, ops: RuntimeOps) -> None:
        super().__init__(inputs, outputs)
        self._product = ops.linear

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, [T, in] -> [T, out]."""
        return self._product(x, self.weight, self.bias)


class Attention(nn.Module):
    """Self-attention with one linear for queries, keys and values: three blocks of D rows, head after head."""

    def __init__(self, config: ModelConfig, ops: RuntimeOps) -> None:
        super().__init__()
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size, ops)
        self.dense = Linear(config.hidden_size, config.hidden_size, ops)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout

    def forward(self, x: Tensor, layout: AttentionLayout, candidates_only: bool) -> Tensor:
        """Apply self-attention, [T, D] -> [T, D], or [R, D] with `candidates_only`."""
        dropout = self.dropout if self.training else 0.0
        return layout(self.query_key_value(x), self.heads, dropout, candidates_only)


class MLP(nn.Module):
    """Feed-forward block, D -> 4 D -> D."""

    def __init__(self, config: ModelConfig, ops: RuntimeOps) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 4 * config.hidden_size, ops)
        self.dense_4h_to_h = Linear(4 * config.hidden_size, config.hidden_size, ops)
        self.approximate = {"tanh": "tanh", "erf": "none"}[config.gelu]  # Hendrycks and Gimpel 2016, section 2

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, [T, D] -> [T, D]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, ops: RuntimeOps) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attention = Attention(config, ops)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config, ops)
        self.dropout = Dropout(config.hidden_dropout, ops)
        self._after_attention: Callable[[Any, Tensor, Tensor], Tensor] = Layer.after_attention
        if config.compile:
            self._after_attention = compiled(Layer.after_attention)

    def forward(self, h: Tensor, layout: AttentionLayout, first_row: int) -> Tensor:
        """Apply the layer, [T, D] -> [T - first_row, D]; only rows from `first_row` on are returned."""
        attended = self.attention(self.input_layernorm(h), layout, first_row > 0)
        return self._after_attention(self, attended, h[first_row:] if first_row else h)

    def after_attention(self, attended: Tensor, h: Tensor) -> Tensor:
        """Add the projection of the attention and the MLP to the rows; this part can be compiled, [T, D] each."""
        x: Tensor = self.dropout(self.attention.dense(attended), h)
        return self.dropout(self.mlp(self.post_attention_layernorm(x)), x)


class Transformer(nn.Module):
    """Position tables, layers and final norm of a GLM."""

    def __init__(self, config: ModelConfig, ops: RuntimeOps) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout, ops)
        self.layers = nn.ModuleList(Layer(config, ops) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)


class GLM(nn.Module):
    """GLM with its language-model head; `lit_glm.model.scoring` defines batches and candidate scores."""

    def __init__(self, config: ModelConfig, ops: RuntimeOps = TORCH_OPS) -> None:
        """Build a freshly initialised model."""
        super().__init__()
        self.ops = traceable(ops) if config.compile else ops
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = Transformer(config, self.ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: N(0, init_std), output linears N(0, init_std / sqrt(2 L)), norms 1 and 0, biases 0."""
        std = self.config.init_std
        output_std = std / math.sqrt(2.0 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if "layernorm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                is_output = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
                nn.init.normal_(parameter, 0.0, output_std if is_output else std)

    def embed(self, tokens: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        """Sum word, position and block-position embedding, [T] each -> [T, D], with embedding dropout."""
        transformer = self.transformer
        h = self.word_embeddings(tokens)
        h = h + transformer.position_embeddings(positions) + transformer.block_position_embeddings(blocks)
        return transformer.dropout(h)

    def encode(self, h: Tensor, layout: AttentionLayout, first_row: int = 0) -> Tensor:
        """Run all layers and the final norm.

        Args:
            h: [T, D] embeddings.
            layout: attention layout.
            first_row: rows before it serve only as keys and values in the last layer, which does not return them.

        Returns:
            [T - first_row, D].
        """
        last = len(self.transformer.layers) - 1
        recompute = self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(self.transformer.layers):
            skip = first_row if number == last else 0
            h = self.ops.checkpoint(layer, h, layout, skip) if recompute else layer(h, layout, skip)
        return self.transformer.final_layernorm(h)

    def log_probabilities(self, h: Tensor, targets: Tensor) -> Tensor:
        """Compute log-probabilities of tokens by the word embedding without bias, [T, D], [T] tokens -> [T] float32."""
        return log_probabilities(h, self.word_embeddings.weight, targets, self.ops)
