"""The ordered lists of passes: once per exported graph, and once per plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
import onnx_ir.passes.common as common

from alloc_moe.passes.attention.expand_latents import ExpandLatentsPass
from alloc_moe.passes.attention.group_query import GroupAttentionPass
from alloc_moe.passes.attention.group_query_rotary import RotaryGroupAttentionPass
from alloc_moe.passes.attention.latent import LatentAttentionPass
from alloc_moe.passes.attention.quantize_cache import CacheScales, QuantizeCachePass
from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.passes.experts.correct import CorrectExpertsPass, ExpertCorrection
from alloc_moe.passes.experts.float_router import FloatRouterPass
from alloc_moe.passes.experts.interleave import InterleaveExpertsPass
from alloc_moe.passes.experts.lower import Allocation, LowerExpertsPass
from alloc_moe.passes.experts.quantize import QuantizeExpertsPass
from alloc_moe.passes.experts.routers.group_limit import GroupLimitPass
from alloc_moe.passes.experts.skip_reshapes import SkipReshapesPass
from alloc_moe.passes.interface.fix_dims import FixDimsPass
from alloc_moe.passes.interface.keep_logits import KeepLogitsPass
from alloc_moe.passes.interface.rename_cache import RenameCachePass
from alloc_moe.passes.linear.fold_transposes import FoldTransposesPass
from alloc_moe.passes.linear.fuse_projections import FuseProjectionsPass
from alloc_moe.passes.linear.join_biases import JoinBiasesPass
from alloc_moe.passes.linear.join_products import JoinProductsPass
from alloc_moe.passes.linear.quantize import QuantizeMatMulsPass
from alloc_moe.passes.linear.untransposed import UntransposedProductsPass
from alloc_moe.passes.norm.skip_norms import SkipNormsPass
from alloc_moe.passes.step.program import StepProgramPass


def normalize_passes(
    formats: Mapping[str, BlockFormat] = MappingProxyType({}),
) -> ir.passes.Sequential:
    """Return what every exported graph goes through, whatever the budget.

    Args:
        formats: How linear layers and embeddings are quantised, by weight.
    """
    return ir.passes.Sequential(
        RenameCachePass(),
        FixDimsPass(),
        QuantizeMatMulsPass(formats),
        FuseProjectionsPass(),
        InterleaveExpertsPass(),
        common.RemoveUnusedNodesPass(),
    )


def specialize_passes(
    allocation: Allocation,
    *,
    pairs: bool,
    positions: int | None = None,
    corrections: Mapping[int, ExpertCorrection] = MappingProxyType({}),
    formats: Mapping[int, BlockFormat] = MappingProxyType({}),
    cache_scales: CacheScales = MappingProxyType({}),
) -> ir.passes.Sequential:
    """Return what turns a normalised graph into the artifact of one plan.

    Args:
        allocation: The plan's part that the graph depends on.
        pairs: For CUDA, whose kernel doesn't skip experts of weight zero, and which takes rows that
            are padded on the right.
        positions: How many the model has, if that is known.
        corrections: What experts are changed by, by MoE layer.
        formats: How experts are quantised, by MoE layer.
        cache_scales: Of an int8 cache.
    """
    step = (StepProgramPass(allocation, positions),) if pairs else ()
    for_cuda = (
        ExpandLatentsPass(),
        UntransposedProductsPass(),
        FoldTransposesPass(),
        JoinProductsPass(),
        JoinBiasesPass(),
        RotaryGroupAttentionPass(positions),
        SkipNormsPass(),
        FloatRouterPass(),
    )
    for_cpu = (
        LatentAttentionPass(),
        GroupLimitPass(),
        FoldTransposesPass(),
        GroupAttentionPass(),
        QuantizeCachePass(cache_scales),
    )
    return ir.passes.Sequential(
        *(for_cuda if pairs else for_cpu),
        KeepLogitsPass(),
        QuantizeExpertsPass(formats),
        CorrectExpertsPass(corrections),
        *step,
        LowerExpertsPass(allocation, pairs=pairs),
        SkipReshapesPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )
