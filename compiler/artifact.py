"""A plan -> the files of its artifact, verified: a graph of ONNX, or a program of torch.

The last stages in their order, for either: export, passes, what is written, verification, metadata.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alloc_moe.compiler.export.normalize import export_model, generation_metadata
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.layer_progress import layers_progress
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.identity import tokenizer_metadata
from alloc_moe.compiler.programs.build import build
from alloc_moe.compiler.rounding.cache_scales import measure_cache_scales
from alloc_moe.compiler.rounding.weights import chosen_digest
from alloc_moe.compiler.verify.parity import verify_artifact
from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.onnx_file import OnnxFile
from alloc_moe.runtime.artifact.plan import (
    GENERATION_KEY,
    NO_STEP_KEY,
    PLAN_KEY,
    PROGRAM_KEY,
    SHARED_CACHE_KEY,
)

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import CompileOptions, Planned, Verification
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.runtime.artifact.plan import AllocationPlan
    from alloc_moe.runtime.console import Console


def build_graph(
    moe: MoeModel,
    planned: Planned,
    token_ids: NDArray[np.int64],
    options: CompileOptions,
    output: package.Output,
    staged: Path,
    console: Console,
) -> tuple[AllocationPlan, Verification]:
    """Export, rewrite, write into `staged`, and verify what was written."""
    plan, corrections, target = planned.plan, planned.corrections, options.target
    with console.step("Exporting the graph"):
        graph = export_model(moe, dtype=target.dtype)
    scales: CacheScales = {}
    if target.cache == "int8":
        with layers_progress(console, "Scaling the cache", moe, passes=1):
            scales = measure_cache_scales(moe, token_ids)
    model = specialize(
        graph,
        plan,
        device=target.device,
        corrections=corrections,
        quantization=moe.quantization,
        cache_scales=scales,
        price_per=target.price_per,
    )
    if SHARED_CACHE_KEY not in model.metadata_props and target.device == "cpu":
        console.note("The cache is copied at every step: attention stays the standard operator")
    if (reason := model.metadata_props.get(NO_STEP_KEY)) is not None:
        console.note(f"Decoding goes through onnxruntime, without a step program: {reason}")
    path = staged / output.graph_name
    given = [corrections, sorted(scales.items()), chosen_digest(moe)]
    package.write_graph(model, path, moe, given, console)
    readings = 2 if moe.quantization else 1  # with rounded weights, and with floats
    with layers_progress(console, "Verifying against PyTorch", moe, passes=readings):
        verification = verify_artifact(
            path,
            moe,
            plan,
            token_ids,
            dtype=target.dtype,
            corrections=corrections,
            cache_scales=scales,
        )
    plan = dataclasses.replace(plan, verify=verification.to_plan())
    package.stamp(path, plan, tokenizer_metadata(moe.checkpoint, carried=not output.bundle))
    if output.bundle:
        package.write_bundle_files(staged / package.FILES, moe, model, plan)
    return plan, verification


def build_program(
    moe: MoeModel,
    planned: Planned,
    token_ids: NDArray[np.int64],
    options: CompileOptions,
    output: package.Output,
    staged: Path,
    console: Console,
) -> tuple[AllocationPlan, Verification]:
    """Trace, write into `staged`, and verify what was written: for those who run it in torch."""
    plan, corrections, dtype = planned.plan, planned.corrections, options.target.dtype
    path = staged / output.graph_name
    interface = build(moe, plan, corrections, path, dtype=dtype, console=console)
    metadata = {
        PROGRAM_KEY: interface.to_json(),
        GENERATION_KEY: generation_metadata(moe),
        **tokenizer_metadata(moe.checkpoint, carried=True),
    }
    files = ArtifactFiles(path, OnnxFile(metadata, {}, frozenset()), plan)
    with layers_progress(console, "Verifying against PyTorch", moe, passes=1):
        verification = verify_artifact(
            files, moe, plan, token_ids, dtype=dtype, corrections=corrections
        )
    plan = dataclasses.replace(plan, verify=verification.to_plan())
    package.stamp_program(path, {PLAN_KEY: plan.to_json(), **metadata})
    return plan, verification
