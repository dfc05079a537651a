"""The compiler's stages in their order.

    checkpoint -> model -> rounded weights -> profile -> plan, corrections -> graph -> files

Stages take plain data and give plain data. Other rooms have one of them, or serve several;
`artifact` has the last ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alloc_moe.compiler.artifact import build_graph, build_program
from alloc_moe.compiler.calibration.windows import calibrate, check_source
from alloc_moe.compiler.checkpoints.build import build_checkpoint, check_checkpoint
from alloc_moe.compiler.choices import UNMEASURED
from alloc_moe.compiler.model.checks.targets import check_target
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.package import output as package
from alloc_moe.compiler.package.space import needed_space
from alloc_moe.compiler.package.versions import versions
from alloc_moe.compiler.planning.allocation import cost_limit, parse_budget
from alloc_moe.compiler.planning.costs import measure_costs, mixed_costs
from alloc_moe.compiler.planning.goals.planner import Planner, token_sizes_of
from alloc_moe.compiler.planning.goals.search import (
    by_activations,
    full_loss,
    meet_goal,
    reachable,
    tell_left_out,
)
from alloc_moe.compiler.planning.goals.traffic import weights_read
from alloc_moe.compiler.planning.latency import latency_path
from alloc_moe.compiler.planning.refinement import Refinement
from alloc_moe.compiler.planning.shapes import expert_shapes
from alloc_moe.compiler.programs.build import check_program
from alloc_moe.compiler.records import Compiled, CompileOptions
from alloc_moe.compiler.rounding.formats import BITS, choose_formats, choose_storage
from alloc_moe.compiler.rounding.stage import round_model
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes.choosing import (
    NEEDLESS,
    leave_out,
    wants_token_sizes,
)
from alloc_moe.compiler.sensitivity.token_sizes.fitting import TOKEN_STATES
from alloc_moe.compiler.verify.parity import check_verifiable
from alloc_moe.compiler.workspace.results import results_path
from alloc_moe.compiler.workspace.states import delete_kept

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.planning.goals.traffic import WeightsRead
    from alloc_moe.compiler.records import (
        Goal,
        Planned,
        ProfileOptions,
        SensitivityProfile,
    )
    from alloc_moe.compiler.rounding.formats import Storage
    from alloc_moe.compiler.workspace.processes import Processes
    from alloc_moe.runtime.artifact.plan import Budget
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console


def compile_model(options: CompileOptions, console: Console) -> Compiled:
    """Compile a checkpoint into an artifact.

    Raises:
        AllocMoeError: Anything that the user can act on; no output file was touched then.
    """
    output = package.parse_output(options.output, force=options.force, form=options.target.form)
    with package.alone(output):
        return _compiled(options, output, console)


def _compiled(options: CompileOptions, output: package.Output, console: Console) -> Compiled:
    moe = _loaded(options, output, console)
    storage = choose_storage(moe.checkpoint, options.target)
    trained = [layer.experts_per_token for layer in moe.layers]
    budget = parse_budget(options.budget, trained, kind=options.plan.cost)
    costs = _costs(moe, options, storage, output, console)
    if costs is not None:
        cost_limit(budget, costs)  # what can't be met is said before the profile is measured
    with_token_sizes = wants_token_sizes(options, budget, moe, console)
    reading = None
    if options.goal is not None:
        reading = _reading(options, options.goal, moe, storage, console, maps=with_token_sizes)
        with_token_sizes = reading.token_sizes > 0
    calibration = calibrate(moe.checkpoint, options.calibration, console)
    loss = 0.0  # not looked at unless it is asked for
    if options.goal is not None and options.goal.kind == "loss":
        loss = full_loss(moe, calibration, console)
    moe = round_model(
        moe,
        storage.chosen,
        options.target.rounding,
        calibration,
        console,
        widths=storage.formats,
    )
    measured = _measured(options, output, moe, calibration, storage, budget, console)
    if with_token_sizes:
        assert measured.path is not None
        assert measured.profile is not None
        fitted = token_sizes_of(measured.profile, measured.path, options, moe, calibration, console)
        measured = dataclasses.replace(measured, token_sizes=fitted)
    planner = Planner(
        moe,
        calibration,
        options.plan,
        measured.profile,
        storage.formats,
        _refinement(options, output),
        console,
        measured.token_sizes,
    )
    if options.goal is None or reading is None:
        moe, planned = planner.of_budget(budget, costs)
    else:
        if measured.token_sizes is None:
            reading = dataclasses.replace(reading, token_sizes=0)
        moe, planned = meet_goal(options.goal, planner, reading, loss)
    if measured.token_sizes and not any(layer.token_sizes for layer in planned.plan.layers):
        leave_out(NEEDLESS, console)
    planned = _stated(planned, moe)
    with package.staging(output, note=console.note) as staged:
        make = build_program if output.is_program else build_graph
        if output.is_checkpoint:
            make = build_checkpoint
        plan, verification = make(moe, planned, calibration.ids, options, output, staged, console)
        package.publish(staged, output)
    delete_kept(output.results_path, TOKEN_STATES)
    return Compiled(output.path, plan, measured.path, verification)


@dataclass(frozen=True)
class _Measured:
    """What a plan goes by: a profile, where one was needed, in its file, and sizes for tokens."""

    path: Path | None = None
    profile: SensitivityProfile | None = None
    token_sizes: tuple[TokenSizes, ...] | None = None


def _loaded(options: CompileOptions, output: package.Output, console: Console) -> MoeModel:
    """Return the model, once it is sure that it can be written as the output that is asked for."""
    target = options.target
    if output.is_checkpoint:
        check_checkpoint(options)
    elif output.is_program:
        check_program(target, output.path)
    else:
        check_verifiable(target.dtype)
    check_source(options.calibration.text)
    moe = load_model(
        options.model,
        console,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        results=output.results_path,
    )
    if not output.is_checkpoint:
        check_target(moe.config, target, program=output.is_program)
    # Torch copies a program's weights from the file that they are written to.
    package.check_space(output, needed_space(moe, options) * (2 if output.is_program else 1))
    return moe


def _reading(
    options: CompileOptions,
    goal: Goal,
    moe: MoeModel,
    storage: Storage,
    console: Console,
    *,
    maps: bool,
) -> WeightsRead:
    """Return what a token reads, without maps of token sizes where the goal leaves none."""
    wanted = weights_read(
        moe.checkpoint,
        dtype=storage.dtype,
        quantization=storage.chosen,
        formats=storage.formats,
        token_sizes=maps,
        dial=options.plan.cap is None,
    )
    found = reachable(goal, wanted, needs_token_sizes=bool(options.token_sizes))
    tell_left_out(goal, wanted, found, console)
    return found


def _measured(
    options: CompileOptions,
    output: package.Output,
    moe: MoeModel,
    calibration: CalibrationSet,
    storage: Storage,
    budget: Budget,
    console: Console,
) -> _Measured:
    """Return the profile, if anything is decided by one."""
    if not _needs_profile(options, budget):
        return _Measured()
    path = options.profile or output.profile_path
    profile = measure_sensitivity(
        moe,
        calibration,
        metric=options.sensitivity,
        redistribution=options.plan.redistribution,
        correction=options.plan.correction,
        formats=storage.formats,
        path=path,
        console=console,
    )
    return _Measured(path, profile)


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
    storage: Storage,
    output: package.Output,
    console: Console,
) -> CostTable | None:
    """Return the prices of experts, unless each costs one activation."""
    dtype, batch = options.target.dtype, options.plan.cost_batch
    shapes = expert_shapes(moe.checkpoint)
    if storage.formats:
        return mixed_costs(shapes, storage.formats, dtype=dtype, bits=BITS[dtype], batch=batch)
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
