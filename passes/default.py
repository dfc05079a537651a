"""The ordered lists of passes: once per exported graph, and once per plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
import onnx_ir.passes.common as common

from alloc_moe.passes.blockwise import BlockFormat
from alloc_moe.passes.correct_experts import CorrectExpertsPass, ExpertCorrection
from alloc_moe.passes.fix_dims import FixDimsPass
from alloc_moe.passes.fold_transposes import FoldTransposesPass
from alloc_moe.passes.interleave_experts import InterleaveExpertsPass
from alloc_moe.passes.lower_experts import Allocation, LowerExpertsPass
from alloc_moe.passes.quantize_experts import QuantizeExpertsPass
from alloc_moe.passes.quantize_matmuls import QuantizeMatMulsPass
from alloc_moe.passes.rename_cache import RenameCachePass


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
        FoldTransposesPass(),
        InterleaveExpertsPass(),
        common.RemoveUnusedNodesPass(),
    )


def specialize_passes(
    allocation: Allocation,
    *,
    pairs: bool,
    corrections: Mapping[int, ExpertCorrection] = MappingProxyType({}),
    formats: Mapping[int, BlockFormat] = MappingProxyType({}),
) -> ir.passes.Sequential:
    """Return what turns a normalised graph into the artifact of one plan.

    Args:
        allocation: The plan's part that the graph depends on.
        pairs: For execution providers that don't skip experts of weight zero.
        corrections: What experts are changed by, by MoE layer.
        formats: How experts are quantised, by MoE layer.
    """
    return ir.passes.Sequential(
        QuantizeExpertsPass(formats),
        CorrectExpertsPass(corrections),
        LowerExpertsPass(allocation, pairs=pairs),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )
