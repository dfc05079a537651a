"""Sensitivity profile and budget -> allocation plan (Alloc-L of arXiv 2604.08133)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from alloc_moe.compiler.errors import BudgetError, ProfileError
from alloc_moe.compiler.planning.costs import CostTable
from alloc_moe.compiler.planning.knapsack import solve_allocation, solve_costs
from alloc_moe.compiler.records import (
    CostKind,
    MoeLayer,
    Redistribution,
    SensitivityProfile,
    Weights,
)
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer


def parse_budget(
    requested: str | float, experts_per_token: Sequence[int], *, kind: CostKind = "activations"
) -> Budget:
    """Return how many expert activations per token, over all layers, a budget allows.

    Args:
        requested: A fraction of the full model's activations in (0, 1] (text with a decimal point,
            or a float), or a whole number of activations (text of digits, or an int). ``1`` is
            one activation, ``1.0`` the full model.
        experts_per_token: K of each MoE layer.
        kind: What the budget is of. Other kinds than activations are budgeted as a fraction of what
            the full model's routed experts use up, so a whole number is refused.

    Returns:
        The budget; a fraction is rounded down to whole activations, exactly: 0.1 of 30 is 3. For
        other kinds ``activations`` says no more than whether it is below the full model; a plan
        says what it really activates.

    Raises:
        BudgetError: No number, or not between one expert in each layer and the full model.
    """
    layers, original = len(experts_per_token), sum(experts_per_token)
    legal = (
        f"Give a fraction from {_smallest_fraction(layers, original)} to 1.0, or a whole number of "
        f"activations from {layers} (one expert in each MoE layer) to {original} (the full model)."
    )
    if kind != "activations":
        return _parse_share(requested, layers, original, kind)
    number = _to_number(requested, legal)
    if isinstance(number, int):
        return Budget(number, _check_activations(number, layers, original, legal), original)
    if not 0 < number <= 1:
        raise BudgetError(f"The budget {requested} is no fraction in (0, 1]. {legal}")
    activations = math.floor(number * original)
    if activations < layers:
        raise BudgetError(
            f"The budget {requested} of {original} activations per token is {activations}, too few "
            f"for {layers} MoE layers, which need one each. {legal}"
        )
    return Budget(float(number), activations, original)


def allocate(
    profile: SensitivityProfile | None,
    layers: Sequence[MoeLayer],
    budget: Budget,
    costs: CostTable | None = None,
) -> list[int]:
    """Return the k of each layer: optimal for the profile, or as even as can be without one.

    Args:
        profile: What fewer experts cost each layer in quality; None for a uniform allocation.
        layers: The model's MoE layers.
        budget: As `parse_budget` returned it, for the same kind of cost.
        costs: What experts use up, where that isn't activations. The budget is then a share of
            what the model as trained uses up, and is never exceeded.

    Raises:
        BudgetError: The cheapest plan is above the budget.
        ProfileError: The profile is of other layers, incomplete, or holds a cost that is no number.
    """
    most = [layer.experts_per_token for layer in layers]
    if costs is None:
        if profile is None:
            return uniform_allocation(most, int(budget.activations))
        return solve_allocation(profiled_costs(profile, layers), int(budget.activations))
    limit = cost_limit(budget, costs)
    if profile is None:
        return _uniform_within(most, costs, limit)
    return solve_costs(profiled_costs(profile, layers), costs.prices, limit)


def cost_limit(budget: Budget, costs: CostTable) -> Fraction:
    """Return what a plan may use up at most, exactly: the budget's share of the original.

    Raises:
        BudgetError: No plan is that cheap.
    """
    limit = Fraction(Decimal(repr(budget.requested))) * costs.original
    if costs.cheapest > limit:
        least = math.ceil(costs.cheapest / costs.original * 1000) / 1000
        raise BudgetError(
            f"The budget {budget.requested} is {float(limit):.6g} of {float(costs.original):.6g} "
            f"{costs.unit}, but one expert in each MoE layer takes {float(costs.cheapest):.6g}. "
            f"Give a fraction from {least} to 1.0."
        )
    return limit


def uniform_allocation(experts_per_token: Sequence[int], budget: int) -> list[int]:
    """Return the same k for every layer, as near as the budget and each layer's K allow.

    Layers with a smaller K than the common k stay at their K. What is left over gives one more
    expert to some of the others, spread evenly over the depth of the model.

    Raises:
        BudgetError: Fewer activations than layers.
    """
    if budget < len(experts_per_token):
        raise BudgetError(f"{budget} activations are too few for {len(experts_per_token)} layers.")
    common = 1
    while common < max(experts_per_token) and budget >= sum(
        min(common + 1, most) for most in experts_per_token
    ):
        common += 1
    allocation = [min(common, most) for most in experts_per_token]
    growable = [layer for layer, most in enumerate(experts_per_token) if most > common]
    extra, places = min(budget - sum(allocation), len(growable)), len(growable)
    for place, layer in enumerate(growable):
        allocation[layer] += (place + 1) * extra // places - place * extra // places
    return allocation


def make_plan(
    layers: Sequence[MoeLayer],
    budget: Budget,
    *,
    source: str,
    profile: SensitivityProfile | None,
    redistribution: Redistribution,
    weights: Weights,
    costs: CostTable | None = None,
    allocation: Sequence[int] | None = None,
) -> AllocationPlan:
    """Return the plan for a budget, allocated as `allocate` does unless `allocation` is given.

    The plan's ``budget.activations`` is what it uses: less than the budget given where fewer
    activations cost no more.

    Raises:
        BudgetError: The cheapest plan is above the budget.
        ProfileError: The profile is of other layers, incomplete, or holds a cost that is no number.
    """
    if allocation is None:
        allocation = allocate(profile, layers, budget, costs)
    sensitivity = {}
    if profile is not None:
        sensitivity = {
            "metric": profile.metric,
            "tokens": profile.tokens,
            "calibration_sha256": profile.calibration_sha256,
            "seed": profile.seed,
        }
    cost = {} if costs is None else costs.to_plan(allocation, cost_limit(budget, costs))
    return AllocationPlan(
        source=source,
        budget=dataclasses.replace(budget, activations=sum(allocation)),
        redistribution=redistribution,
        weights=weights,
        layers=tuple(
            PlannedLayer(layer.name, layer.num_experts, layer.experts_per_token, k)
            for layer, k in zip(layers, allocation, strict=True)
        ),
        cost=cost,
        sensitivity=sensitivity,
    )


def _to_number(requested: str | float, legal: str) -> int | Fraction:
    """Digits are an int; digits with a decimal point the exact fraction they spell."""
    if isinstance(requested, int):
        return requested
    if isinstance(requested, float):
        if math.isfinite(requested):
            return Fraction(Decimal(repr(requested)))
    elif re.fullmatch(r"\d{1,18}", text := requested.strip(), re.ASCII):
        return int(text)
    elif re.fullmatch(r"\d{1,18}\.\d*|\.\d+", text, re.ASCII):
        return Fraction(text)
    raise BudgetError(f"The budget {requested!r} is no positive number. {legal}")


def _parse_share(requested: str | float, layers: int, original: int, kind: CostKind) -> Budget:
    legal = f"Give a fraction in (0, 1], the share of the original model's {kind}, such as 0.5."
    number = _to_number(requested, legal)
    if isinstance(number, int):
        raise BudgetError(
            f"The budget {requested} is a number of activations, which --cost {kind} can't count. "
            f"{legal}"
        )
    if not 0 < number <= 1:
        raise BudgetError(f"The budget {requested} is no fraction in (0, 1]. {legal}")
    return Budget(float(number), max(layers, math.floor(number * original)), original)


def _uniform_within(most: Sequence[int], costs: CostTable, limit: Fraction) -> list[int]:
    """Return the uniform allocation of the most activations that is within the limit."""
    for activations in range(sum(most), len(most), -1):
        allocation = uniform_allocation(most, activations)
        if costs.total(allocation) <= limit:
            return allocation
    # One expert in each layer, or what was measured to be cheaper still.
    return [min(range(1, len(row) + 1), key=lambda k: row[k - 1]) for row in costs.prices]


def _check_activations(number: int, layers: int, original: int, legal: str) -> int:
    if layers <= number <= original:
        return number
    if number == 1:
        raise BudgetError(
            f"The budget 1 means one activation per token, but there are {layers} MoE layers. "
            "Write 1.0 for the full model."
        )
    raise BudgetError(
        f"The budget {number} is {'below' if number < layers else 'above'} what the {layers} MoE "
        f"layers can use. {legal}"
    )


def _smallest_fraction(layers: int, original: int) -> float:
    return math.ceil(Fraction(layers, original) * 1000) / 1000


def profiled_costs(
    profile: SensitivityProfile, layers: Sequence[MoeLayer]
) -> list[tuple[float, ...]]:
    """Return what fewer experts cost each layer in quality.

    Raises:
        ProfileError: The profile is of other layers, or incomplete.
    """
    found = list(zip(profile.layer_names, profile.experts_per_token, strict=True))
    expected = [(layer.name, layer.experts_per_token) for layer in layers]
    if found != expected:
        raise ProfileError(
            f"The sensitivity profile is of {_layers_in_words(found)}, but the model has "
            f"{_layers_in_words(expected)}. Profile this model."
        )
    rows = [row for row in profile.costs if row is not None]
    if len(rows) < len(layers):
        raise ProfileError(
            f"The sensitivity profile is incomplete: {len(rows)} of {len(layers)} layers are "
            "measured. Run alloc-profile again with the same file to finish it."
        )
    return rows


def _layers_in_words(layers: Sequence[tuple[str, int]]) -> str:
    counts = sorted({k for _, k in layers})
    return f"{len(layers)} MoE layers ({layers[0][0]}..., top-{'/'.join(map(str, counts))})"
