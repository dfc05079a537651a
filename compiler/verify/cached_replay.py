"""Prefill and decode with a cache, layer by layer: every call of every run, then the next layer.

A model whose decoder layers are read when they run is so read once for all calls, whatever their
number. At each decoder layer the calls of a run follow each other, as their keys and values do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.rounding.cache_scales import RoundedCache

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.reference.experts import Activations
    from alloc_moe.passes.attention.quantize_cache import CacheScales


@dataclass
class CachedRun:
    """Calls of a model that share a cache, and after `run_by_layers` what they gave.

    ``inputs`` are (input_ids, attention_mask, position_ids) of each call; ``plan`` puts in force
    what the model runs under. With ``cache_scales`` the cache is rounded to 8 bits.
    """

    inputs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    plan: Callable[[], AbstractContextManager[Activations]]
    cache_scales: CacheScales = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)  # [batch, tokens, vocabulary] per call
    executed: list[int] = field(default_factory=list)  # pairs run, per MoE layer
    margin: float = math.inf
    lead: float = math.inf
    states: list[torch.Tensor | None] = field(default_factory=list)  # per call, at some layer


@torch.inference_mode()
def run_by_layers(moe: MoeModel, runs: Sequence[CachedRun]) -> None:
    """Run all calls, and fill in what `runs` lack."""
    stack = DecoderStack(moe.model, moe.layers[0])
    for run in runs:
        run.executed, run.states = [0] * len(moe.layers), [None] * len(run.inputs)
    for layer in range(len(stack)):
        with stack.resident(layer):
            for run in runs:
                _run_layer(moe, stack, run, layer)
    for run in runs:
        for states in run.states:
            assert states is not None
            logits = stack.head(states.flatten(0, 1))
            run.logits.append(logits.view(*states.shape[:2], -1))


def _run_layer(moe: MoeModel, stack: DecoderStack, run: CachedRun, layer: int) -> None:
    cache = RoundedCache(run.cache_scales) if run.cache_scales else DynamicCache()
    cache.layers = DynamicCache(config=moe.model.config).layers
    # The model asks its first layer how long the past is, but only this one has seen it. A state
    # doesn't say, and needs no mask for which that counted.
    if not cache.is_linear[layer]:
        cache.layers = [cache.layers[layer]] * len(cache.layers)
    for call, (ids, mask, positions) in enumerate(run.inputs):
        context: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }
        with quiet(), run.plan() as activations:
            run.states[call] = stack.run(
                ids, run.states[call], start=layer, stop=layer + 1, context=context
            )
        run.margin = min(run.margin, activations.margin)
        run.lead = min(run.lead, activations.lead)
        pairs = zip(run.executed, activations.executed, strict=True)
        run.executed = [before + now for before, now in pairs]
