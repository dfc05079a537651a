"""Graph and plan -> the artifact's graph: where the plan becomes code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.passes.attention.group_query import group_attention
from alloc_moe.passes.attention.group_query_rotary import right_padded_rows
from alloc_moe.passes.attention.latent import latent_caches
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.correct import ExpertCorrection
from alloc_moe.passes.experts.lower import Allocation, TokenFactors
from alloc_moe.passes.interface.stamp_plan import StampPlanPass
from alloc_moe.runtime.artifact.plan import (
    GENERATION_KEY,
    LATENT_CACHE_KEY,
    PADDING_KEY,
    PLAN_KEY,
    SHARED_CACHE_KEY,
)
from alloc_moe.runtime.artifact.token_sizes import LIMIT

if TYPE_CHECKING:
    import onnx_ir as ir

    from alloc_moe.compiler.records import Correction, PricePer, Quantization
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact.plan import AllocationPlan, PlannedLayer


def specialize(
    graph: ir.Model,
    plan: AllocationPlan,
    *,
    device: str,
    corrections: Sequence[Correction | None] = (),
    quantization: Quantization | None = None,
    cache_scales: CacheScales = MappingProxyType({}),
    price_per: PricePer = "call",
) -> ir.Model:
    """Return a copy of a normalised graph with a plan compiled in; weights stay lazy and shared.

    With `cache_scales` its cache is int8. With `price_per` of "sequence" the dial, if the plan has
    one, takes a price of each.

    Raises:
        UnsupportedModelError: There are scales, but its attention takes no int8 cache.
    """
    model = graph.clone()
    parameters = layer_parameters(plan)
    allocation = Allocation(
        [given.k for given in parameters],
        plan.redistribution,
        plan.weights,
        thresholds=[float(given.threshold) for given in parameters],
        sizes=[layer.sizes for layer in plan.layers],
        token_factors=[_token_factors(layer) for layer in plan.layers],
        overlap=plan.overlap or 0.0,
        cap=plan.cap,
        dial=plan.takes_price,
        price_per_sequence=plan.takes_price and price_per == "sequence",
    )
    changed = {
        layer: ExpertCorrection(correction.scale, correction.bias)
        for layer, correction in enumerate(corrections)
        if correction is not None
    }
    formats = dict(enumerate(quantization.experts)) if quantization else {}
    specialize_passes(
        allocation,
        pairs=device == "cuda",
        positions=json.loads(model.metadata_props.get(GENERATION_KEY, "{}")).get("context_length"),
        corrections=changed,
        formats=formats,
        cache_scales=cache_scales,
    )(model)
    StampPlanPass(PLAN_KEY, plan.to_json())(model)
    attention = next(group_attention(model), None)
    if attention is not None:
        model.metadata_props[SHARED_CACHE_KEY] = _cache_type(attention.inputs[3])
        if right_padded_rows(model) is not None:
            model.metadata_props[PADDING_KEY] = "right"
    latents = next(latent_caches(model), None)
    if latents is not None:
        for key in (SHARED_CACHE_KEY, LATENT_CACHE_KEY):
            model.metadata_props[key] = _cache_type(latents.inputs[0])
    if cache_scales and model.metadata_props.get(SHARED_CACHE_KEY) != "int8":
        raise UnsupportedModelError(
            "An int8 cache needs keys and values of one shape in float32 on the CPU, which this "
            "model doesn't have. Use --cache float32."
        )
    return model


def _token_factors(layer: PlannedLayer) -> TokenFactors | None:
    if layer.token_sizes is None:
        return None
    return TokenFactors(*layer.token_sizes.arrays, LIMIT)


def _cache_type(past: ir.Value | None) -> str:
    assert past is not None
    assert past.dtype is not None
    return {"FLOAT": "float32"}.get(past.dtype.name, past.dtype.name.lower())
