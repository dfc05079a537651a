"""An OLMoE of random weights in PyTorch, whose values don't matter: made fast, for timing."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import init_empty_weights
from transformers import OlmoeConfig, OlmoeForCausalLM

from random_models.shapes import Shape

_POOL = (1 << 24) + 3  # random weights to repeat: not a multiple of any row, so that rows differ


def configuration(shape: Shape) -> OlmoeConfig:
    """Return the configuration of an OLMoE of that shape; nothing ends its texts."""
    return OlmoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        max_position_embeddings=shape.context,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.norm_eps,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(shape: Shape, *, layers: int, dtype: torch.dtype) -> OlmoeForCausalLM:
    """Return a model whose weights are filled fast: matrices from one pool of random numbers."""
    config = configuration(dataclasses.replace(shape, layers=layers))
    with init_empty_weights(include_buffers=False):
        model = OlmoeForCausalLM(config)
    pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for number, module in enumerate(model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            weight = torch.ones(value.shape, dtype=dtype)
            if value.dim() > 1:
                flat, offset = weight.view(-1), number * 65537 % _POOL
                for start in range(0, len(flat), _POOL):
                    piece = flat[start : start + _POOL]
                    piece.copy_(pool.roll(offset)[: len(piece)])
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()
