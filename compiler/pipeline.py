"""The compiler's stages in their order: the only file that knows it.

    checkpoint -> model -> rounded weights -> profile -> plan, corrections -> graph -> files

Stages take plain data and give plain data. Other rooms have one of them, or serve several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.compiler.calibration.windows import calibrate, check_source
from alloc_moe.compiler.checkpoints.build import build_checkpoint, check_checkpoint
from alloc_moe.compiler.choices import UNMEASURED
from alloc_moe.compiler.export.normalize import export_model, generation_metadata
from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.checks.targets import check_target
from alloc_moe.compiler.model.layer_progress import layers_progress
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.identity import tokenizer_metadata
from alloc_moe.compiler.package.space import needed_space
from alloc_moe.compiler.package.versions import versions
from alloc_moe.compiler.planning.allocation import cost_limit, parse_budget
from alloc_moe.compiler.planning.costs import measure_costs, mixed_costs
from alloc_moe.compiler.planning.goals.planner import Planner
from alloc_moe.compiler.planning.goals.search import (
    by_activations,
    full_loss,
    meet_goal,
    reachable,
)
from alloc_moe.compiler.planning.goals.traffic import weights_read
from alloc_moe.compiler.planning.latency import latency_path
from alloc_moe.compiler.planning.plan import expert_sizes
from alloc_moe.compiler.planning.refinement import Refinement
from alloc_moe.compiler.planning.shapes import expert_shapes
from alloc_moe.compiler.programs.build import build, check_program
from alloc_moe.compiler.records import Compiled, CompileOptions
from alloc_moe.compiler.rounding.cache_scales import measure_cache_scales
from alloc_moe.compiler.rounding.formats import (
    BITS,
    choose_formats,
    mixed_formats,
)
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.rounding.weights import chosen_digest
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.choosing import (
    fit_if_possible,
    wants_token_sizes,
)
from alloc_moe.compiler.sensitivity.token_sizes.fitting import TOKEN_STATES
from alloc_moe.compiler.sensitivity.token_sizes.kept import token_sizes_path
from alloc_moe.compiler.verify.parity import check_verifiable, verify_artifact
from alloc_moe.compiler.workspace.results import results_path
from alloc_moe.compiler.workspace.states import delete_kept
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
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.records import (
        Planned,
        ProfileOptions,
        SensitivityProfile,
        Verification,
    )
    from alloc_moe.compiler.workspace.processes import Processes
    from alloc_moe.passes.attention.quantize_cache import CacheScales
    from alloc_moe.passes.blockwise import BlockFormat
    from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget
    from alloc_moe.runtime.console import Console


def compile_model(options: CompileOptions, console: Console) -> Compiled:
    """Compile a checkpoint into an artifact.

    Raises:
        AllocMoeError: Anything that the user can act on; no output file was touched then.
    """
    output = package.parse_output(options.output, force=options.force, form=options.target.form)
    if output.is_checkpoint:
        check_checkpoint(options)
    elif output.is_program:
        check_program(options.target, output.path)
    else:
        check_verifiable(options.target.dtype)
    check_source(options.calibration.text)
    moe = load_model(
        options.model,
        console,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        results=output.results_path,
    )
    if not output.is_checkpoint:
        check_target(moe.config, options.target, program=output.is_program)
    # Torch copies a program's weights from the file that they are written to.
    package.check_space(output, needed_space(moe, options) * (2 if output.is_program else 1))
    target = options.target
    chosen = None
    if target.dtype in BITS:
        chosen = choose_formats(
            moe.checkpoint, target.dtype, block=target.block, device=target.device
        )
    formats = mixed_formats(chosen) if chosen and target.mixed_bits else ()
    trained = [layer.experts_per_token for layer in moe.layers]
    budget = parse_budget(options.budget, trained, kind=options.plan.cost)
    costs = _costs(moe, options, formats, output, console)
    if costs is not None:
        cost_limit(budget, costs)  # what can't be met is said before the profile is measured
    with_token_sizes = wants_token_sizes(options, budget, moe, console)
    goal = options.goal
    if goal is not None:
        stored: Any = {"dtype": target.dtype, "quantization": chosen, "formats": formats}
        reading = weights_read(moe.checkpoint, **stored, token_sizes=with_token_sizes)
        reading = reachable(goal, reading, needs_token_sizes=bool(options.token_sizes))
        if with_token_sizes and not reading.token_sizes:
            with_token_sizes = False
            console.note("Token sizes are left out: their maps take what --target-bytes asks for")
    calibration = calibrate(moe.checkpoint, options.calibration, console)
    loss = 0.0  # not looked at unless it is asked for
    if goal is not None and goal.kind == "loss":
        loss = full_loss(moe, calibration, console)
    moe = round_model(moe, chosen, target.rounding, calibration, console, widths=formats)
    profile_path = None
    profile = None
    if _needs_profile(options, budget):
        profile_path = options.profile or output.profile_path
        profile = measure_sensitivity(
            moe,
            calibration,
            metric=options.sensitivity,
            redistribution=options.plan.redistribution,
            correction=options.plan.correction,
            formats=formats,
            path=profile_path,
            console=console,
        )
    refinement = _refinement(options, output)
    token_sizes = None
    if with_token_sizes:
        sizes = expert_sizes("price", profile, moe)
        assert sizes is not None
        assert profile_path is not None
        path = token_sizes_path(profile_path)
        token_sizes = fit_if_possible(options, moe, calibration, sizes, path, console)
    planner = Planner(
        moe, calibration, options.plan, profile, formats, refinement, console, token_sizes
    )
    if goal is None:
        moe, planned = planner.of_budget(budget, costs)
    else:
        if token_sizes is None:
            reading = dataclasses.replace(reading, token_sizes=0)
        moe, planned = meet_goal(goal, planner, reading, loss)
    planned = _stated(planned, moe)
    with package.staging(output, note=console.note) as staged:
        make = _build_program if output.is_program else _build
        if output.is_checkpoint:
            make = build_checkpoint
        plan, verification = make(moe, planned, calibration.ids, options, output, staged, console)
        package.publish(staged, output)
    delete_kept(output.results_path, TOKEN_STATES)
    return Compiled(output.path, plan, profile_path, verification)


def profile_model(
    options: ProfileOptions, console: Console, processes: Processes
) -> SensitivityProfile:
    """Measure how sensitive a checkpoint's layers are to fewer experts.

    Args:
        options: What is measured.
        console: Where progress is told.
        processes: Those that share the work; all of them call this.

    Raises:
        AllocMoeError: Anything that the user can act on.
    """
    check_source(options.calibration.text)
    moe = load_model(
        options.model,
        console,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        results=None if options.path is None else results_path(options.path),
    )
    chosen = None
    if options.dtype in BITS:
        chosen = choose_formats(moe.checkpoint, options.dtype, block=options.block)
    calibration = calibrate(moe.checkpoint, options.calibration, console)
    moe = round_model(moe, chosen, options.rounding, calibration, console)
    profile = measure_sensitivity(
        moe,
        calibration,
        metric=options.sensitivity,
        redistribution=options.redistribution,
        correction=options.correction,
        path=options.path,
        console=console,
        processes=processes,
    )
    moe.results.delete()  # by every process: machines have disks of their own
    return profile


def _costs(
    moe: MoeModel,
    options: CompileOptions,
    formats: Sequence[Sequence[BlockFormat]],
    output: package.Output,
    console: Console,
) -> CostTable | None:
    """Return the prices of experts, unless each costs one activation."""
    dtype, batch = options.target.dtype, options.plan.cost_batch
    shapes = expert_shapes(moe.checkpoint)
    if formats:
        return mixed_costs(shapes, formats, dtype=dtype, bits=BITS[dtype], batch=batch)
    if options.plan.cost == "activations":
        return None
    return measure_costs(
        options.plan.cost,
        shapes,
        dtype=dtype,
        batch=batch,
        device=options.target.device,
        path=latency_path(options.profile or output.profile_path),
        console=console,
    )


def _needs_profile(options: CompileOptions, budget: Budget) -> bool:
    """Whether anything is decided by sensitivities; a dial needs sizes at the full budget too."""
    plan = options.plan
    if options.target.mixed_bits or (options.goal is not None and not by_activations(plan)):
        return True
    if plan.allocation != "sensitivity" or plan.redistribution in UNMEASURED:
        return False
    return plan.redistribution == "price" or budget.activations < budget.original


def _stated(planned: Planned, moe: MoeModel) -> Planned:
    """Return a plan that says what its artifact is made of, and by what."""
    quantization = moe.quantization.to_plan() if moe.quantization else {}
    plan = dataclasses.replace(planned.plan, versions=versions(), quantization=quantization)
    return dataclasses.replace(planned, plan=plan)


def _refinement(options: CompileOptions, output: package.Output) -> Refinement | None:
    plan = options.plan
    if not plan.refine:
        return None
    profile = options.profile or output.profile_path
    path = profile.with_name(f"{profile.stem}.refine.json")
    return Refinement(plan.refine, plan.refine_seconds, options.calibration.seed, path)


def _build(
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


def _build_program(
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
