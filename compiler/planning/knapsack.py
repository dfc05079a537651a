"""Costs of k experts in each layer, and a limit -> the k of each layer. Pure: numpy and scipy."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from alloc_moe.compiler.errors import BudgetError, ProfileError

Costs: TypeAlias = Sequence[Sequence[float]]
"""``costs[l][k - 1]`` is the cost of k experts in layer l. Rows may differ in length."""

# HiGHS takes a plan that exceeds the limit by a millionth for one within. Such plans are excluded
# one by one, this many times; then the limit is lowered.
_EXCLUSIONS = 20
# What the largest cost is scaled to: HiGHS may stop 1e-6 short of the optimum.
_COST_RANGE = 1e4


def solve_allocation(costs: Costs, budget: int) -> list[int]:
    """Return the k of each layer that minimises the summed cost within the budget, exactly.

    The grouped knapsack D[l, b] = min over k of D[l-1, b-k] + S[l, k], in O(L * B * K). Costs are
    added as the exact rationals that the floats are, so neither rounding nor the order of layers
    decides. Of plans of equal cost the one with the fewest activations is taken; of those, the one
    whose last layer has fewest, then its last but one, and so on.

    Args:
        costs: ``costs[l][k - 1]`` is the cost of k experts in layer l. Rows may differ in length,
            and cost need not fall with k.
        budget: The most activations all layers may have together.

    Raises:
        BudgetError: Fewer activations than layers.
        ProfileError: A cost is NaN or infinite.
    """
    return best_allocations(costs, budget, 1)[0]


def best_allocations(costs: Costs, budget: int, n: int) -> list[list[int]]:
    """Return the n best plans within the budget, all different, in the order of their cost.

    Plans of equal cost come in the order in which `solve_allocation` prefers them, so the first is
    its plan. There are fewer than n if the budget has room for no more.

    The table D bounds exactly what a plan that is fixed from layer l on can still reach. Searched
    best first, no plan is begun that isn't among the n: that takes n * L * K steps after the table.

    Raises:
        BudgetError: Fewer activations than layers.
        ProfileError: A cost is NaN or infinite.
    """
    if any(len(row) == 0 for row in costs):
        raise ValueError("Each layer needs the cost of at least one expert.")
    if budget < len(costs):
        raise BudgetError(f"{budget} activations are too few for {len(costs)} layers.")
    budget = min(budget, sum(len(row) for row in costs))
    keys = _lexicographic_keys(costs, budget)
    best = [np.zeros(budget + 1, dtype=object)]  # best[l][b]: the first l layers, at most b in all
    for layer, row in enumerate(keys):
        best.append(_add_layer(best[-1], row, layers_before=layer))

    found: list[list[int]] = []
    # (key of the best plan that ends so, its end from the last layer on, the end's key, what is
    # left). Of equal keys the lexicographically first end is taken: ties come in their order.
    begun: list[tuple[int, tuple[int, ...], int, int]] = [(best[-1][budget], (), 0, budget)]
    while begun and len(found) < n:
        _, end, key, left = heapq.heappop(begun)
        layer = len(costs) - len(end) - 1
        if layer < 0:
            found.append(list(reversed(end)))
            continue
        for k, more in enumerate(keys[layer][: left - layer], start=1):
            reached = key + more
            bound = reached + best[layer][left - k]
            heapq.heappush(begun, (bound, (*end, k), reached, left - k))
    return found


def solve_costs(costs: Costs, prices: Costs, limit: float | Fraction) -> list[int]:
    """Return the k of each layer that minimises the summed cost at a summed price within the limit.

    The multiple-choice knapsack, solved by HiGHS. Prices are added up again as exact rationals, so
    the limit is never exceeded; the cost is least up to the solver's tolerance, a millionth of the
    largest difference within a layer. Of plans of equal cost, so far as the solver tells them
    apart, the one of the lowest price is taken.

    Args:
        costs: ``costs[l][k - 1]`` is the cost of k experts in layer l; it need not fall with k.
        prices: Of the same shape: what k experts in layer l use up; it need not rise with k.
        limit: The highest summed price.

    Raises:
        BudgetError: The cheapest plan is above the limit.
        ProfileError: A cost is NaN or infinite.
    """
    _check_finite(costs)
    choices = _Choices(costs, prices)
    if choices.cheapest > limit:
        raise BudgetError(
            f"The cheapest plan, at {float(choices.cheapest):.6g}, is above the limit of "
            f"{float(limit):.6g}. Give a larger budget."
        )
    first = choices.minimize(choices.costs, choices.prices, Fraction(limit))
    # The cheapest of the plans that cost no more. What HiGHS takes for equal may cost more.
    ceiling = choices.total(choices.costs, first)
    second = choices.try_minimize(choices.prices, choices.costs, ceiling)
    within = [p for p in (first, second) if choices.total(choices.prices, p) <= limit]
    return min(within, key=choices.key)


class _Choices:
    """A multiple-choice knapsack: one k of each layer, dominated ones left out, exact rationals."""

    def __init__(self, costs: Costs, prices: Costs) -> None:
        self.ks: list[int] = []
        self.layers: list[int] = []
        self.costs: list[Fraction] = []
        self.prices: list[Fraction] = []
        self.cheapest = Fraction(0)
        for layer, (row, price_row) in enumerate(zip(costs, prices, strict=True)):
            if len(row) != len(price_row) or not row:
                raise ValueError("Each k of each layer needs a cost and a price.")
            for cost, price, k in _undominated(row, price_row):
                self.ks.append(k)
                self.layers.append(layer)
                self.costs.append(cost)
                self.prices.append(price)
            self.cheapest += min(Fraction(price) for price in price_row)
        self._rows = (np.array(self.layers) == np.arange(len(costs))[:, None]).astype(float)

    def total(self, values: Sequence[Fraction], plan: Sequence[int]) -> Fraction:
        """Return the exact sum of `values` over a plan's choices."""
        return sum(
            (
                value
                for value, layer, k in zip(values, self.layers, self.ks, strict=True)
                if plan[layer] == k
            ),
            Fraction(0),
        )

    def key(self, plan: Sequence[int]) -> tuple[Fraction, Fraction, list[int]]:
        """Return what orders plans: cost, then price, then fewest in the last layers."""
        return self.total(self.costs, plan), self.total(self.prices, plan), list(plan)[::-1]

    def minimize(
        self, objective: Sequence[Fraction], weights: Sequence[Fraction], limit: Fraction
    ) -> list[int]:
        """Return the plan of the least objective whose weights' sum is within the limit, exactly.

        A plan that HiGHS takes for one within the limit and that isn't is excluded by a constraint
        of its own. Should there be many, the limit is lowered until HiGHS keeps below the true one.
        """
        excluded: list[list[int]] = []
        lowered = 0.0
        while True:
            plan = self.try_minimize(objective, weights, limit, lowered=lowered, excluded=excluded)
            if self.total(weights, plan) <= limit:
                return plan
            if len(excluded) < _EXCLUSIONS:
                excluded.append(plan)
            else:
                lowered = 2 * lowered or 1e-6

    def try_minimize(
        self,
        objective: Sequence[Fraction],
        weights: Sequence[Fraction],
        limit: Fraction,
        *,
        lowered: float = 0.0,
        excluded: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        """Return what HiGHS takes for the best plan: it may exceed the limit by rounding.

        Args:
            objective: What is minimised, of each choice.
            weights: What the limit is on, of each choice.
            limit: The largest sum of weights.
            lowered: The share of the room above the least possible sum that isn't used.
            excluded: Plans that are not to be returned.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        extra, base = self._above_least(weights)
        room = limit - base
        possible = np.array([weight <= room for weight in extra])
        used = [w if p else Fraction(0) for w, p in zip(extra, possible, strict=True)]
        sums = LinearConstraint(_scaled(used, room), -np.inf, max(1 - lowered, 0.0))
        one_each = LinearConstraint(self._rows, 1, 1)
        not_these = [
            LinearConstraint(self._as_choices(plan), -np.inf, len(plan) - 1) for plan in excluded
        ]
        above = self._above_least(objective)[0]
        result = milp(
            _scaled(above, max(above)) * _COST_RANGE,
            integrality=np.ones(len(self.ks)),
            bounds=Bounds(0, possible.astype(float)),
            constraints=[one_each, sums, *not_these],
            options={"mip_rel_gap": 0.0},
        )
        # The lightest choice of every layer has weight zero, so there always is a solution.
        assert result.x is not None, result.message
        plan = [0] * len(self._rows)
        for index in np.flatnonzero(np.round(result.x)):
            plan[self.layers[index]] = self.ks[index]
        return plan

    def _as_choices(self, plan: Sequence[int]) -> npt.NDArray[np.float64]:
        pairs = zip(self.layers, self.ks, strict=True)
        return np.array([float(plan[layer] == k) for layer, k in pairs])

    def _above_least(self, values: Sequence[Fraction]) -> tuple[list[Fraction], Fraction]:
        """Return by how much each choice is above its layer's least, and the sum of the least."""
        least: dict[int, Fraction] = {}
        for value, layer in zip(values, self.layers, strict=True):
            least[layer] = min(value, least.get(layer, value))
        above = [v - least[layer] for v, layer in zip(values, self.layers, strict=True)]
        return above, sum(least.values(), Fraction(0))


def _undominated(
    costs: Sequence[float], prices: Sequence[float]
) -> list[tuple[Fraction, Fraction, int]]:
    """Return cost, price and k of the choices that none beats in both; fewest experts of equals."""
    kept: list[tuple[Fraction, Fraction, int]] = []
    choices = zip(
        map(Fraction, costs), map(Fraction, prices), range(1, len(costs) + 1), strict=True
    )
    for choice in sorted(choices):
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    return kept


def _scaled(values: Sequence[Fraction], one: Fraction) -> npt.NDArray[np.float64]:
    """Return the values as multiples of `one`; where that is zero, all of them are."""
    return np.array([float(value / one) if one else 0.0 for value in values])


def _check_finite(costs: Costs) -> None:
    for layer, row in enumerate(costs):
        for k, cost in enumerate(row, start=1):
            if not math.isfinite(cost):
                raise ProfileError(
                    f"The cost of {k} experts in MoE layer {layer} is {cost}, which can't be "
                    "compared: the model's output on the calibration text wasn't finite. Check its "
                    "weights."
                )


def _lexicographic_keys(costs: Costs, budget: int) -> list[list[int]]:
    """Integers whose sums order plans by cost first and activations second."""
    _check_finite(costs)
    exact = [[Fraction(float(cost)) for cost in row] for row in costs]
    scale = math.lcm(*(cost.denominator for row in exact for cost in row)) * (budget + 1)
    return [[int(cost * scale) + k for k, cost in enumerate(row, start=1)] for row in exact]


def _add_layer(
    before: npt.NDArray[np.object_], row: Sequence[int], *, layers_before: int
) -> npt.NDArray[np.object_]:
    """One step of the recurrence; infinite where the budget is below one per layer."""
    after = np.full_like(before, math.inf)
    for k, key in enumerate(row[: len(before) - layers_before - 1], start=1):
        reached = after[
            layers_before + k :
        ]  # infinity is compared only: adding to it could overflow
        np.minimum(reached, before[layers_before:-k] + key, out=reached)
    return after
