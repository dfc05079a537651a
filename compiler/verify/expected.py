"""What PyTorch computes under a plan, for an artifact to be compared with."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.model.quiet import quiet
from alloc_moe.compiler.records import SCORED
from alloc_moe.compiler.reference.experts import under_plan
from alloc_moe.compiler.rounding.cache_scales import RoundedCache
from alloc_moe.compiler.verify.batch import BATCH_TOKENS, PromptBatch
from alloc_moe.compiler.verify.cached_replay import CachedRun, run_by_layers
from alloc_moe.compiler.verify.routers import watched_routers

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction
    from alloc_moe.compiler.reference.experts import Activations, Turn
    from alloc_moe.compiler.reference.policies import Kept
    from alloc_moe.compiler.verify.routers import Runs
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact.plan import AllocationPlan

    _Plan = Callable[[], AbstractContextManager[Activations]]

logger = logging.getLogger(__name__)

NEAR_TIE = 5e-6
"""Router weights closer than this may be ranked differently by two correct float32 computations."""

_ATTEMPTS = 8


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives for a batch: logits of real tokens, and experts run by layer.

    ``margin`` is that of the plan's closest decision, ``lead`` that of the routers'.
    """

    batch: PromptBatch
    logits: NDArray[np.float32]
    executed: list[int]
    margin: float
    lead: float

    @property
    def closest(self) -> float:
        """By how much the closest of all decisions was taken."""
        return min(self.margin, self.lead)


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
    plans = [_in_force(moe, plan, price, corrections) for price in prices]
    if moe.offloading is None:
        return [
            _clearest(_reference(moe, batch, run, cache_scales) for batch in batches)
            for run in plans
        ]
    pairs = [(batch, run) for run in plans for batch in batches]
    found = _run(moe, pairs, cache_scales)
    return [
        _clearest(found[start : start + _ATTEMPTS]) for start in range(0, len(found), _ATTEMPTS)
    ]


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
    pairs = [
        (given.batch, _in_force(moe, plan, price, corrections))
        for given, price in zip(references, prices, strict=True)
    ]
    return _run(moe, pairs, {})


def with_same_ties(
    reference: Reference,
    chosen: Sequence[Sequence[NDArray[np.bool_]]],
    *,
    moe: MoeModel,
    plan: AllocationPlan,
    price: float | None,
    corrections: Sequence[Correction | None] | None,
    cache_scales: CacheScales,
) -> Reference:
    """Run PyTorch on the same batch again, and let it take near-ties as an artifact took them.

    A decision is turned only if it was taken by less than `NEAR_TIE`, be it the plan's or a
    router's. Of each token one expert runs at least, and where the plan fixes how many experts run
    in a call, so many do. What is returned has no near-ties: none is left open.

    Args:
        reference: What is run again.
        chosen: Which experts the artifact ran, by MoE layer and call [tokens, experts], padding
            included.
        moe: The model.
        plan: What it runs under.
        price: None is the plan's own.
        corrections: What its experts are changed by, per MoE layer.
        cache_scales: Of an int8 cache.
    """
    calls, routed = ([iter(layer) for layer in chosen] for _ in range(2))
    fixed = plan.redistribution not in SCORED or plan.cap is not None

    def turn(layer: int, ids: torch.Tensor, kept: Kept) -> torch.Tensor:
        runs = torch.from_numpy(next(calls[layer])).gather(1, ids)
        turned = torch.where(kept.gaps < NEAR_TIE, runs, kept.mask)
        turned = torch.where(turned.any(1, keepdim=True), turned, kept.mask)
        return kept.mask if fixed and turned.sum() != kept.mask.sum() else turned

    def runs(layer: int) -> torch.Tensor:
        return torch.from_numpy(next(routed[layer]))

    run = _in_force(moe, plan, price, corrections, turn, runs)
    (found,) = _run(moe, [(reference.batch, run)], cache_scales)
    return dataclasses.replace(found, margin=math.inf, lead=math.inf)


def _in_force(
    moe: MoeModel,
    plan: AllocationPlan,
    price: float | None,
    corrections: Sequence[Correction | None] | None,
    turn: Turn | None = None,
    runs: Runs | None = None,
) -> _Plan:
    @contextmanager
    def in_force() -> Iterator[Activations]:
        with (
            under_plan(moe, plan, corrections, price=price, turn=turn) as activations,
            watched_routers(moe.model, moe.layers, activations, near=NEAR_TIE, runs=runs),
        ):
            yield activations

    return in_force


def _run(
    moe: MoeModel, pairs: Sequence[tuple[PromptBatch, _Plan]], cache_scales: CacheScales
) -> list[Reference]:
    """Run batches under plans: all at once where reading the layers takes longer than that."""
    if moe.offloading is None:
        return [_reference(moe, batch, plan, cache_scales) for batch, plan in pairs]
    runs = [CachedRun(batch.inputs(), run, cache_scales) for batch, run in pairs]
    run_by_layers(moe, runs)
    return [
        Reference(
            batch,
            batch.real([logits.numpy() for logits in run.logits]),
            run.executed,
            run.margin,
            run.lead,
        )
        for (batch, _), run in zip(pairs, runs, strict=True)
    ]


def _clearest(references: Iterable[Reference]) -> Reference:
    """Return the first without near-ties, else the clearest; those after it aren't asked for."""
    best: Reference | None = None
    for attempt, reference in enumerate(references):
        if best is None or reference.margin > best.margin:
            best = reference
        if best.margin >= NEAR_TIE:
            break
        logger.debug("Verification text %d has a near-tie of %.1e.", attempt, reference.margin)
    assert best is not None
    return best


def _reference(
    moe: MoeModel,
    batch: PromptBatch,
    plan: _Plan,
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
    return Reference(
        batch, batch.real(logits), activations.executed, activations.margin, activations.lead
    )
