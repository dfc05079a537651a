"""Model, profile and budget -> plan and corrections: everything that is decided before export.

Exact redistributions take each layer's k from the allocation. Those that compare scores measure
their thresholds on the calibration tokens: per layer to meet the allocation's k (``threshold``), or
one for the whole model to meet the budget (``price``, ``top-p``, ``ratio``), which is an allocation
of its own. Corrections are fitted to the plan that will run, and the thresholds then set again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.correction.fitting import Corrections, fit_corrections
from alloc_moe.compiler.correction.trials import Running
from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.planning.allocation import (
    cost_limit,
    make_plan,
    profiled_costs,
    uniform_allocation,
)
from alloc_moe.compiler.planning.divergence import Divergence
from alloc_moe.compiler.planning.refinement import Refinement, refine_allocation, refine_sizes
from alloc_moe.compiler.planning.thresholds import (
    Setting,
    Thresholds,
    common_threshold,
    dial_passes,
    keep_all,
    layer_thresholds,
    measure_dial,
)
from alloc_moe.compiler.records import (
    COMMON,
    SCORED,
    Correction,
    CorrectionMode,
    Planned,
    PlanOptions,
)
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.runtime.artifact.plan import DialPoint

if TYPE_CHECKING:
    from alloc_moe.compiler.calibration.windows import CalibrationSet
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.planning.costs import CostTable
    from alloc_moe.compiler.records import SensitivityProfile
    from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget
    from alloc_moe.runtime.artifact.token_sizes import TokenSizes
    from alloc_moe.runtime.console import Console

_DIAL_TOKENS = 8192
_OVERLAP_TOKENS = 4096
_DIAL_GAP = 0.5  # activations between the plan's own point and the next


def make_planned(
    moe: MoeModel,
    calibration: CalibrationSet,
    budget: Budget,
    options: PlanOptions,
    *,
    profile: SensitivityProfile | None,
    console: Console,
    token_sizes: tuple[TokenSizes, ...] | None = None,
    costs: CostTable | None = None,
    allocation: Sequence[int] | None = None,
    refinement: Refinement | None = None,
) -> Planned:
    """Return the plan that spends a budget best, as far as the options let it.

    Args:
        moe: The model.
        calibration: The tokens that thresholds and corrections are measured on.
        budget: From `parse_budget`.
        options: What else is wanted.
        profile: Costs per layer, and expert sizes for ``price``; None for a uniform allocation.
        console: Where progress is reported.
        token_sizes: For ``price``: what tokens multiply the sizes of each layer's experts by, from
            `fit_token_sizes`. None gives all tokens the same. The plan has none where nothing can
            ever be chosen by them.
        costs: What experts use up, where that isn't activations.
        allocation: The k of each layer if that is decided already.
        refinement: How the plan is improved by measuring it as a whole, if at all.

    Raises:
        BudgetError: The budget is below the cheapest plan.
        ProfileError: The profile doesn't suit the model or the redistribution.
    """
    most = [layer.experts_per_token for layer in moe.layers]
    # One threshold for all layers divides the budget itself, and spends all of it.
    given = options.redistribution in COMMON or budget.activations == budget.original
    if allocation is None and given:
        allocation = uniform_allocation(most, int(budget.activations))
    plan = make_plan(
        moe.layers,
        budget,
        source=moe.checkpoint.source,
        profile=profile,
        redistribution=options.redistribution,
        weights=options.weights,
        costs=costs,
        allocation=allocation,
    )
    full = plan.budget.activations == plan.budget.original
    sizes = expert_sizes(options.redistribution, profile, moe)
    if _nothing_to_choose(plan, options.cap):
        token_sizes = None
    setting = Setting(options.redistribution, options.weights, sizes, token_sizes=token_sizes)
    if options.redistribution == "price":
        setting = _with_overlap(
            moe, calibration, setting, options, plan.budget.activations, console
        )
    if refinement is not None and profile is not None and not full:
        plan, setting = _refined(
            moe, calibration, plan, setting, refinement, budget, profile, costs, console
        )
    if options.redistribution in SCORED:
        plan = dataclasses.replace(plan, cap=options.cap)
    wanted = plan
    plan = _with_thresholds(moe, calibration, wanted, setting, console)
    corrections: tuple[Correction | None, ...] = (None,) * len(moe.layers)
    if options.correction != "none" and not full:
        fitted = _fit(moe, calibration, plan, options.correction, console)
        corrections = fitted.layers
        if any(corrections):
            setting = dataclasses.replace(setting, corrections=corrections)
            plan = _with_thresholds(moe, calibration, wanted, setting, console)
        plan = dataclasses.replace(plan, correction=fitted.to_plan(options.correction))
    if options.redistribution == "price" and options.dial:
        plan = _with_dial(
            moe, calibration, plan, setting, options, wanted.budget.activations, console
        )
    return Planned(plan, corrections)


def _nothing_to_choose(plan: AllocationPlan, cap: float | None) -> bool:
    """Whether every call runs all experts, or one in each layer: a cap leaves no dial."""
    activations = plan.budget.activations
    one_each = activations == len(plan.layers) and cap == 1
    return cap is not None and (activations == plan.budget.original or one_each)


def _with_overlap(
    moe: MoeModel,
    calibration: CalibrationSet,
    setting: Setting,
    options: PlanOptions,
    activations: float,
    console: Console,
) -> Setting:
    """Return the setting with the overlap at which the plan diverges least from the full model."""
    tried = [dataclasses.replace(setting, overlap=overlap) for overlap in options.overlaps]
    if activations == sum(layer.experts_per_token for layer in moe.layers):
        return tried[-1]  # all run at price 0; this one is for the dial
    if len(tried) == 1:
        return tried[0]
    windows = max(1, _OVERLAP_TOKENS // calibration.sequence_length)
    divergence = Divergence(moe, dataclasses.replace(calibration, ids=calibration.ids[:windows]))
    with console.progress("Measuring overlap", len(tried), unit="values") as progress:
        found = []
        for candidate in tried:
            found.append(divergence.of_price(candidate, activations))
            progress.advance()
    return tried[found.index(min(found))]


def _refined(
    moe: MoeModel,
    calibration: CalibrationSet,
    plan: AllocationPlan,
    setting: Setting,
    refinement: Refinement,
    budget: Budget,
    profile: SensitivityProfile,
    costs: CostTable | None,
    console: Console,
) -> tuple[AllocationPlan, Setting]:
    """Return a plan with better k, or for ``price`` a setting with better sizes."""
    if setting.redistribution == "price":
        sizes, report = refine_sizes(
            moe,
            calibration,
            setting,
            refinement,
            activations=plan.budget.activations,
            console=console,
        )
        setting = dataclasses.replace(setting, sizes=sizes)
    else:
        ks, report = refine_allocation(
            moe,
            calibration,
            setting,
            refinement,
            profile=profile,
            activations=int(budget.activations),
            limit=None if costs is None else float(cost_limit(budget, costs)),
            costs=costs,
            first=[int(layer.k) for layer in plan.layers],
            console=console,
        )
        layers = zip(plan.layers, ks, strict=True)
        plan = dataclasses.replace(
            plan,
            layers=tuple(dataclasses.replace(layer, k=k) for layer, k in layers),
            budget=dataclasses.replace(plan.budget, activations=sum(ks)),
            cost={} if costs is None else costs.to_plan(ks, cost_limit(budget, costs)),
        )
    sensitivity = {**plan.sensitivity, "refined": report.to_plan()}
    return dataclasses.replace(plan, sensitivity=sensitivity), setting


def expert_sizes(
    redistribution: str, profile: SensitivityProfile | None, moe: MoeModel
) -> tuple[tuple[float, ...], ...] | None:
    """Return what ``price`` multiplies each expert's weight by; None for other redistributions.

    Without a profile every expert counts the same.

    Raises:
        ProfileError: The profile's metric measures no sizes.
    """
    if redistribution != "price":
        return None
    if profile is None:
        return tuple((1.0,) * layer.num_experts for layer in moe.layers)
    profiled_costs(profile, moe.layers)  # of this model, and complete
    found = [row for row in profile.expert_sizes if row is not None]
    if len(found) != len(moe.layers):
        raise ProfileError(
            f"The redistribution price needs expert sizes, which the metric {profile.metric} "
            "doesn't measure. Use --sensitivity fisher or output, or another --redistribute."
        )
    # In single precision, as the artifact has them: then a plan in JSON decides the same.
    return tuple(tuple(float(f"{size:.6g}") for size in row) for row in found)


def _with_thresholds(
    moe: MoeModel,
    calibration: CalibrationSet,
    wanted: AllocationPlan,
    setting: Setting,
    console: Console,
) -> AllocationPlan:
    """Return the plan with thresholds that meet what is wanted, and the means measured with them.

    Exact redistributions need none.
    """
    if setting.redistribution not in SCORED:
        return wanted
    with console.progress("Setting thresholds", None, unit="passes") as progress:
        found = _thresholds(moe, calibration, wanted, setting, advance=progress.advance)
    by_price = setting.redistribution == "price"
    sizes = setting.sizes or (None,) * len(wanted.layers)
    of_tokens = setting.token_sizes or (None,) * len(wanted.layers)
    values = [None] * len(wanted.layers) if by_price else found.values
    given = zip(found.ks, values, sizes, of_tokens, strict=True)
    layers = tuple(
        dataclasses.replace(layer, k=k, threshold=value, sizes=row, token_sizes=factors)
        for layer, (k, value, row, factors) in zip(wanted.layers, given, strict=True)
    )
    return dataclasses.replace(
        wanted,
        layers=layers,
        price=found.values[0] if by_price else None,
        overlap=setting.overlap if by_price and setting.overlap else None,
        budget=dataclasses.replace(wanted.budget, activations=found.activations),
    )


def _thresholds(
    moe: MoeModel,
    calibration: CalibrationSet,
    wanted: AllocationPlan,
    setting: Setting,
    *,
    advance: Callable[[int], None],
) -> Thresholds:
    ids = torch.from_numpy(calibration.ids)
    if wanted.budget.activations == wanted.budget.original:
        trained = tuple(float(layer.k_original) for layer in wanted.layers)
        return Thresholds((keep_all(setting.redistribution),) * len(trained), trained)
    if setting.redistribution in COMMON:
        return common_threshold(moe, ids, setting, wanted.budget.activations, advance=advance)
    ks = [layer.k for layer in wanted.layers]
    return layer_thresholds(moe, ids, setting, ks, advance=advance)


def _fit(
    moe: MoeModel,
    calibration: CalibrationSet,
    plan: AllocationPlan,
    mode: CorrectionMode,
    console: Console,
) -> Corrections:
    running = running_on_text(plan)
    ids = torch.from_numpy(calibration.ids)
    with console.progress("Correcting", 2 * len(moe.layers), unit="steps") as progress:
        fitted = fit_corrections(moe, ids, running, mode=mode, advance=progress.advance)
    plainer = [
        f"{layer.name}: {kind}"
        for layer, kind in zip(moe.layers, fitted.kinds, strict=True)
        if kind != mode
    ]
    if plainer:
        console.note(f"Layers where --correct {mode} didn't help: {', '.join(plainer)}")
    return fitted


def running_on_text(plan: AllocationPlan) -> Running:
    """Return how a plan runs on the calibration text."""
    # A cap is for single calls; what is measured on text is for the mean.
    parameters = [dataclasses.replace(given, cap=None) for given in layer_parameters(plan)]
    # Of calibration windows each is a pool of its own, whoever shares one later.
    policy = "sequence" if plan.redistribution == "batch" else plan.redistribution
    return Running(parameters, policy, plan.weights)  # type: ignore[arg-type]


def _with_dial(
    moe: MoeModel,
    calibration: CalibrationSet,
    plan: AllocationPlan,
    setting: Setting,
    options: PlanOptions,
    asked: float,
    console: Console,
) -> AllocationPlan:
    if options.cap is not None:
        console.note("A capped artifact has a fixed budget: the cap is for one price.")
        return plan
    windows = max(1, _DIAL_TOKENS // calibration.sequence_length)
    ids = torch.from_numpy(calibration.ids[:windows])
    with console.progress("Measuring the dial", dial_passes(), unit="prices") as progress:
        dial = measure_dial(moe, ids, setting, advance=progress.advance)
    assert plan.price is not None
    # The budget asked for shall give the very price that was set for it.
    own = DialPoint(float(math.floor(asked)), plan.price)
    others = (point for point in dial if abs(point.activations - own.activations) >= _DIAL_GAP)
    points = sorted((own, *others), key=lambda point: -point.activations)
    return dataclasses.replace(plan, dial=tuple(points))
