"""From the model's configuration to a GLM with its first weights."""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from lit_glm.config.schema import ModelConfig
from lit_glm.model.checkpoint import load_checkpoint
from lit_glm.model.glm import GLM, GLMConfig
from lit_glm.model.runtime_ops import RuntimeOps


def _glm_config(config: ModelConfig) -> GLMConfig:
    return GLMConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        gelu=config.gelu,
        init_std=config.init_std,
        activation_checkpointing=config.activation_checkpointing,
        attention=config.attention,
        compile=config.compile,
    )


def build_glm(config: ModelConfig, kernels: Optional[RuntimeOps] = None) -> Tuple[GLM, List[str]]:
    """Build a model and load its checkpoint, if one is given.

    Args:
        config: shape and `init_checkpoint`.
        kernels: what the runtime computes in its own way; None: nothing.

    Returns:
        The model, and what loading did besides copying.
    """
    glm = GLM(_glm_config(config), kernels)
    done = load_checkpoint(glm, config.init_checkpoint) if config.init_checkpoint else []
    return glm, done


def meta_state_dict(config: ModelConfig) -> Dict[str, Tensor]:
    """Names and shapes of the weights, without memory for their values where torch can do that (from 2.0)."""
    if torch.__version__.startswith("1."):
        return GLM(_glm_config(config)).state_dict()
    with torch.device("meta"):
        return GLM(_glm_config(config)).state_dict()
