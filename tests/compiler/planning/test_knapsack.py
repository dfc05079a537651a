from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from alloc_moe.compiler.errors import BudgetError, ProfileError
from alloc_moe.compiler.planning.knapsack import best_allocations, solve_allocation, solve_costs

Costs = list[list[float]]

INTEGERS = st.integers(-5, 5).map(float)
FLOATS = st.floats(-1e6, 1e6) | st.floats(0, 1e-6)


def ragged(cost: st.SearchStrategy[float], layers: int = 5, most: int = 4) -> st.SearchStrategy:
    """Matrices with rows of different lengths and a budget each of them can meet."""
    rows = st.lists(st.lists(cost, min_size=1, max_size=most), min_size=1, max_size=layers)
    return rows.flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(len(costs), sum(map(len, costs)) + 2))
    )


def key(costs: Costs, allocation: Sequence[int]) -> tuple[Fraction, int, tuple[int, ...]]:
    """Cost, then activations, then fewest in the last layers."""
    cost = sum((Fraction(row[k - 1]) for row, k in zip(costs, allocation, strict=True)), Fraction())
    return cost, sum(allocation), tuple(reversed(allocation))


def every_plan(costs: Costs) -> list[list[int]]:
    return [list(a) for a in itertools.product(*(range(1, len(row) + 1) for row in costs))]


def brute_force(costs: Costs, budget: int) -> list[int]:
    return in_order(costs, budget)[0]


def in_order(costs: Costs, budget: int) -> list[list[int]]:
    within = (a for a in every_plan(costs) if sum(a) <= budget)
    return sorted(within, key=lambda a: key(costs, a))


@given(ragged(INTEGERS))
def test_equals_brute_force_ties_included(case: tuple[Costs, int]) -> None:
    assert solve_allocation(*case) == brute_force(*case)


@given(ragged(FLOATS))
def test_equals_brute_force_on_real_costs(case: tuple[Costs, int]) -> None:
    assert solve_allocation(*case) == brute_force(*case)


def optimum_by_milp(costs: Costs, budget: int) -> float:
    flat = np.array([cost for row in costs for cost in row])
    ks = np.array([k for row in costs for k in range(1, len(row) + 1)])
    of_layer = np.array([layer for layer, row in enumerate(costs) for _ in row])
    one_each = (of_layer == np.arange(len(costs))[:, None]).astype(float)
    result = milp(
        flat,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(ks, 0, budget)],
    )
    assert result.success
    return float(result.fun)


@settings(max_examples=40, deadline=None)
@given(ragged(st.integers(-100, 100).map(float), layers=12, most=8))
def test_cost_equals_that_of_an_integer_program(case: tuple[Costs, int]) -> None:
    costs, budget = case
    allocation = solve_allocation(costs, budget)
    assert sum(allocation) <= budget
    assert float(key(costs, allocation)[0]) == pytest.approx(
        optimum_by_milp(costs, budget), abs=1e-6
    )


def test_a_model_of_64_layers_equals_an_integer_program() -> None:
    costs = np.random.default_rng(0).gamma(1.0, size=(64, 8)).cumsum(1)[:, ::-1].tolist()
    allocation = solve_allocation(costs, 256)
    found = float(key(costs, allocation)[0])
    assert found == pytest.approx(optimum_by_milp(costs, 256), rel=1e-6)


def test_rounding_does_not_decide_ties() -> None:
    tiny = 2.0**-52  # lost in a float sum with 1e9
    costs = [[1.0, 1.0 - tiny], [1e9, 1e9]]
    assert solve_allocation(costs, 4) == [2, 1]


def test_equal_costs_take_the_fewest_activations() -> None:
    assert solve_allocation([[1.0, 1.0, 1.0], [2.0, 2.0]], 5) == [1, 1]


def test_more_experts_than_the_budget_can_be_worse() -> None:
    assert solve_allocation([[0.0, 5.0], [3.0, 0.0]], 4) == [1, 2]


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_costs_that_are_no_numbers_are_rejected(cost: float) -> None:
    with pytest.raises(ProfileError, match=r"cost of 2 experts in MoE layer 1 is -?(nan|inf)"):
        solve_allocation([[1.0], [1.0, cost]], 3)


def test_a_budget_below_one_each_is_rejected() -> None:
    with pytest.raises(BudgetError, match="1 activations are too few for 2 layers"):
        solve_allocation([[1.0], [1.0]], 1)


@given(ragged(INTEGERS) | ragged(FLOATS), st.integers(1, 40))
def test_the_n_best_plans_come_in_their_order(case: tuple[Costs, int], n: int) -> None:
    assert best_allocations(*case, n) == in_order(*case)[:n]


def test_the_n_best_of_a_large_model_differ_and_rise_in_cost() -> None:
    costs = np.random.default_rng(1).gamma(1.0, size=(48, 16)).round(2).tolist()
    plans = best_allocations(costs, 200, 64)
    assert plans[0] == solve_allocation(costs, 200)
    assert plans == sorted(plans, key=lambda plan: key(costs, plan))
    assert len({tuple(plan) for plan in plans}) == 64
    assert all(sum(plan) <= 200 for plan in plans)


def test_a_tight_budget_has_one_plan_only() -> None:
    assert best_allocations([[3.0, 1.0], [2.0, 0.0]], 2, 5) == [[1, 1]]


def priced(number: st.SearchStrategy[float]) -> st.SearchStrategy:
    """Costs, prices of the same shape, and a limit between the cheapest and the dearest plan."""
    pair = st.tuples(number, number.map(abs))
    rows = st.lists(st.lists(pair, min_size=1, max_size=4), min_size=1, max_size=4)
    return st.tuples(rows, st.floats(0, 1))


def unzip(rows: list[list[tuple[float, float]]]) -> tuple[Costs, Costs]:
    return [[c for c, _ in row] for row in rows], [[p for _, p in row] for row in rows]


def total(values: Costs, plan: Sequence[int]) -> Fraction:
    return sum((Fraction(r[k - 1]) for r, k in zip(values, plan, strict=True)), Fraction())


def limit_between(prices: Costs, share: float) -> Fraction:
    low, high = (sum(map(Fraction, map(end, prices)), Fraction()) for end in (min, max))
    return low + (high - low) * Fraction(share)


@settings(max_examples=60, deadline=None)
@given(priced(INTEGERS))
def test_priced_plans_equal_brute_force_ties_included(case: tuple[list, float]) -> None:
    costs, prices = unzip(case[0])
    limit = limit_between(prices, case[1])
    plan = solve_costs(costs, prices, limit)
    every = [p for p in every_plan(costs) if total(prices, p) <= limit]
    best = min((total(costs, p), total(prices, p)) for p in every)
    assert (total(costs, plan), total(prices, plan)) == best


@settings(max_examples=60, deadline=None)
@given(priced(st.floats(-1e6, 1e6) | st.floats(0, 1e-6)))
def test_priced_plans_on_real_numbers_keep_the_limit(case: tuple[list, float]) -> None:
    costs, prices = unzip(case[0])
    limit = limit_between(prices, case[1])
    plan = solve_costs(costs, prices, limit)
    assert total(prices, plan) <= limit
    best = min(total(costs, p) for p in every_plan(costs) if total(prices, p) <= limit)
    assert total(costs, plan) - best <= 1e-6 * max(max(row) - min(row) for row in costs)


def test_a_price_of_k_is_the_activation_budget() -> None:
    costs = np.random.default_rng(0).gamma(1.0, size=(24, 8)).cumsum(1)[:, ::-1].tolist()
    prices = [[float(k) for k in range(1, 9)]] * 24
    assert solve_costs(costs, prices, 96) == solve_allocation(costs, 96)


def test_a_limit_missed_by_less_than_the_solver_sees_is_still_kept() -> None:
    # Forty pairs that exceed the limit by a billionth: each looks feasible to the solver.
    better = [[10.0, 1.0 - i / 1000] for i in range(40)]
    prices = [[0.0, 1.0 + 1e-9]] * 40
    plan = solve_costs(better, prices, 1.0)
    assert plan == [1] * 40
    assert solve_costs(better, prices, 1.0 + 1e-9) == [1] * 39 + [2]


def test_a_layer_that_is_expensive_gives_way() -> None:
    costs = [[1.0, 0.0], [1.0, 0.0]]
    assert solve_costs(costs, [[1.0, 2.0], [10.0, 20.0]], 15.0) == [2, 1]


def test_a_limit_below_the_cheapest_plan_names_both() -> None:
    with pytest.raises(BudgetError, match=r"cheapest plan, at 3\.5, is above the limit of 3\b"):
        solve_costs([[1.0, 0.0], [1.0]], [[1.5, 3.0], [2.0]], 3.0)


def test_priced_costs_that_are_no_numbers_are_rejected() -> None:
    with pytest.raises(ProfileError, match="cost of 1 experts in MoE layer 0 is nan"):
        solve_costs([[math.nan]], [[1.0]], 3.0)
