"""What PyTorch computes under a plan, for an artifact to be compared with."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.compiler.rounding.cache_scales import RoundedCache
from alloc_moe.compiler.verify.batch import BATCH_TOKENS, PromptBatch
from alloc_moe.compiler.verify.cached_replay import CachedRun, run_by_layers

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction, Redistribution, Weights
    from alloc_moe.compiler.reference.experts import Activations
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact.plan import AllocationPlan

logger = logging.getLogger(__name__)

# Router weights closer than this may be ranked differently by two correct float32 computations.
_NEAR_TIE = 5e-6
_ATTEMPTS = 8

_InForce = Callable[[], "AbstractContextManager[Activations]"]


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives for a batch: logits of real tokens, experts run by layer, least margin."""

    batch: PromptBatch
    logits: NDArray[np.float32]
    executed: list[int]
    margin: float


def clear_references(
    moe: MoeModel,
    plan: AllocationPlan,
    token_ids: NDArray[np.int64],
    prices: Sequence[float | None],
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales = MappingProxyType({}),
) -> list[Reference]:
    """Run PyTorch, at each price, on a part of the text without near-ties or the clearest part.

    Args:
        moe: The model.
        plan: What it runs under.
        token_ids: The text [windows, tokens].
        prices: None is the plan's own.
        corrections: What its experts are changed by, per MoE layer.
        cache_scales: Of an int8 cache, which is then rounded alike.
    """
    text = token_ids.reshape(-1)
    text = np.resize(text, max(BATCH_TOKENS, text.size))
    last = text.size - BATCH_TOKENS
    starts = [attempt * BATCH_TOKENS % (last + 1) for attempt in range(_ATTEMPTS)]
    batches = [PromptBatch.of(text[start : start + BATCH_TOKENS]) for start in starts]
    plans = _in_force(moe, plan, prices, corrections)
    if moe.offloading is None:
        return [
            _clearest(_reference(moe, batch, run, cache_scales) for batch in batches)
            for run in plans
        ]
    pairs = [(batch, run) for run in plans for batch in batches]
    found = iter(_by_layers(moe, pairs, cache_scales))
    return [_clearest(list(itertools.islice(found, len(batches)))) for _ in plans]


def run_again(
    moe: MoeModel,
    plan: AllocationPlan,
    references: Sequence[Reference],
    prices: Sequence[float | None],
    corrections: Sequence[Correction | None] | None,
) -> list[Reference]:
    """Return what another model gives for the batches of references, at the price of each.

    Args:
        moe: The model.
        plan: What it runs under.
        references: Whose batches.
        prices: One per reference; None is the plan's own.
        corrections: What its experts are changed by, per MoE layer.
    """
    plans = _in_force(moe, plan, prices, corrections)
    pairs = [(given.batch, run) for given, run in zip(references, plans, strict=True)]
    if moe.offloading is None:
        return [_reference(moe, batch, run, {}) for batch, run in pairs]
    return _by_layers(moe, pairs, {})


def _in_force(
    moe: MoeModel,
    plan: AllocationPlan,
    prices: Sequence[float | None],
    corrections: Sequence[Correction | None] | None,
) -> list[_InForce]:
    """Return what puts the plan in force, at each price."""
    return [
        functools.partial(
            allocated,
            moe.model,
            moe.layers,
            layer_parameters(plan, price),
            redistribution=cast("Redistribution", plan.redistribution),
            weights=cast("Weights", plan.weights),
            corrections=corrections,
        )
        for price in prices
    ]


def _by_layers(
    moe: MoeModel, pairs: Sequence[tuple[PromptBatch, _InForce]], cache_scales: CacheScales
) -> list[Reference]:
    """Run batches all at once: reading the layers takes longer than running them."""
    runs = [CachedRun(batch.inputs(), run, cache_scales) for batch, run in pairs]
    run_by_layers(moe, runs)
    return [
        Reference(
            batch, batch.real([logits.numpy() for logits in run.logits]), run.executed, run.margin
        )
        for (batch, _), run in zip(pairs, runs, strict=True)
    ]


def _clearest(references: Iterable[Reference]) -> Reference:
    """Return the first without near-ties, else the clearest; those after it aren't asked for."""
    best: Reference | None = None
    for attempt, reference in enumerate(references):
        if best is None or reference.margin > best.margin:
            best = reference
        if best.margin >= _NEAR_TIE:
            break
        logger.debug("Verification text %d has a near-tie of %.1e.", attempt, reference.margin)
    assert best is not None
    return best


def _reference(
    moe: MoeModel,
    batch: PromptBatch,
    plan: _InForce,
    cache_scales: CacheScales,
) -> Reference:
    logits = []
    cache = RoundedCache(cache_scales) if cache_scales else None
    with torch.inference_mode(), quiet(), plan() as activations:
        for ids, mask, positions in batch.inputs():
            output = moe.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(output.logits.float().numpy())
    return Reference(batch, batch.real(logits), activations.executed, activations.margin)
