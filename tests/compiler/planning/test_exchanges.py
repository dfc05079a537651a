from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.compiler.errors import OutputError, ProfileError
from alloc_moe.compiler.planning.exchanges import Plan, refine, search
from alloc_moe.compiler.planning.knapsack import best_allocations, solve_allocation
from alloc_moe.runtime.console import Console

LAYERS, MOST, BUDGET = 4, 4, 9


class Loss:
    """Additive costs and what pairs of layers add when both are short; counts its calls."""

    def __init__(self, seed: int, *, layers: int = LAYERS, most: int = MOST) -> None:
        random = np.random.default_rng(seed)
        rows = random.gamma(1.0, size=(layers, most))
        self.costs = (-np.sort(-rows, axis=1) - rows.min(axis=1, keepdims=True)).tolist()
        self._pairs = random.normal(size=(layers, layers)) * 0.3
        self._most = most
        self.calls: list[Plan] = []

    def __call__(self, plan: Plan) -> float:
        self.calls.append(plan)
        return self.value(plan)

    def value(self, plan: Plan) -> float:
        short = (self._most - np.array(plan)) / self._most
        additive = sum(row[k - 1] for row, k in zip(self.costs, plan, strict=True))
        return float(additive + short @ self._pairs @ short)


def every_plan(budget: int) -> list[Plan]:
    plans = itertools.product(range(1, MOST + 1), repeat=LAYERS)
    return [plan for plan in plans if sum(plan) <= budget]


@given(st.integers(0, 10**6), st.integers(1, 10))
def test_the_plan_found_is_never_worse_than_the_best_by_sums(seed: int, n: int) -> None:
    loss = Loss(seed)
    plan, report = refine(loss.costs, BUDGET, loss, n)
    by_sums = tuple(solve_allocation(loss.costs, BUDGET))
    assert report.first_loss == loss.value(by_sums)
    assert report.loss == loss.value(tuple(plan)) <= report.first_loss
    assert sum(plan) <= BUDGET
    assert all(1 <= k <= MOST for k in plan)
    assert len(loss.calls) == len(set(loss.calls)) == report.measured


@given(st.integers(0, 10**6))
def test_no_exchange_improves_the_plan_found(seed: int) -> None:
    loss = Loss(seed)
    plan, report = refine(loss.costs, BUDGET, loss, 4, seed=seed)
    assert report.finished
    for giver, taker in itertools.permutations(range(LAYERS), 2):
        other = list(plan)
        other[giver] -= 1
        other[taker] += 1
        if other[giver] >= 1 and other[taker] <= MOST:
            assert loss.value(tuple(other)) >= report.loss


def test_the_optimum_is_found_where_sums_mislead() -> None:
    # Sums halve the loss of each; but together layers 0 and 3 must not both be short.
    outer, inner = [0.4, 0.2, 0.1, 0.05], [0.5, 0.1, 0.0, 0.0]
    costs = [outer, inner, inner, outer]

    def loss(plan: Plan) -> float:
        together = (MOST - plan[0]) * (MOST - plan[3]) / 5
        return sum(row[k - 1] for row, k in zip(costs, plan, strict=True)) + together

    best = min(every_plan(BUDGET), key=loss)
    plan, report = refine(costs, BUDGET, loss, 1)
    assert loss(tuple(plan)) == loss(best) < report.first_loss
    assert report.exchanges > 0


def test_all_starts_are_measured_and_the_best_is_taken() -> None:
    loss = Loss(3)
    starts = [tuple(plan) for plan in best_allocations(loss.costs, BUDGET, 1000)]
    plan, report = refine(loss.costs, BUDGET, loss, 1000)
    assert tuple(plan) == min(every_plan(BUDGET), key=loss.value)
    assert (report.starts, report.exchanges) == (len(starts), 0)


def test_what_another_compile_measures_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    other, whole = Loss(8, layers=8), Loss(7, layers=8)

    class Together(Loss):
        def __call__(self, plan: Plan) -> float:
            if not self.calls:
                refine(other.costs, 16, other, 3, cache_path=path)
            return super().__call__(plan)

    loss = Together(7, layers=8)
    expected, _ = refine(whole.costs, 16, whole, 3)
    assert refine(loss.costs, 16, loss, 3, cache_path=path, fingerprint="one")[0] == expected
    again = Loss(8, layers=8)
    refine(again.costs, 16, again, 3, cache_path=path)
    assert again.calls == []


def test_the_same_seed_takes_the_same_path() -> None:
    first, second, other = Loss(5, layers=8), Loss(5, layers=8), Loss(5, layers=8)
    refine(first.costs, 16, first, 2, seed=1)
    refine(second.costs, 16, second, 2, seed=1)
    refine(other.costs, 16, other, 2, seed=2)
    assert first.calls == second.calls != other.calls


def test_an_interrupted_search_goes_on_without_measuring_again(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    whole = Loss(7, layers=8)
    expected, report = refine(whole.costs, 16, whole, 3)

    class Interrupted(Loss):
        def __call__(self, plan: Plan) -> float:
            if len(self.calls) == 10:
                raise KeyboardInterrupt
            return super().__call__(plan)

    first, second = Interrupted(7, layers=8), Loss(7, layers=8)
    with pytest.raises(KeyboardInterrupt):
        refine(first.costs, 16, first, 3, cache_path=path)
    found, resumed = refine(second.costs, 16, second, 3, cache_path=path)
    assert found == expected
    assert first.calls + second.calls == whole.calls
    assert (resumed.measured, resumed.remembered) == (len(whole.calls) - 10, 10)
    assert (resumed.loss, resumed.exchanges) == (report.loss, report.exchanges)
    third = Loss(7, layers=8)
    assert refine(third.costs, 16, third, 3, cache_path=path)[0] == expected
    assert third.calls == []


def test_losses_of_another_fingerprint_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    one, other, again = Loss(1), Loss(2), Loss(1)
    refine(one.costs, BUDGET, one, 2, cache_path=path, fingerprint="one")
    refine(other.costs, BUDGET, other, 2, cache_path=path, fingerprint="other")
    refine(again.costs, BUDGET, again, 2, cache_path=path, fingerprint="one")
    assert other.calls
    assert again.calls == []
    assert set(json.loads(path.read_text())["losses"]) == {"one", "other"}


def test_a_search_without_time_measures_the_best_plan_by_sums_only(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    loss = Loss(9)
    plan, report = refine(loss.costs, BUDGET, loss, 5, seconds=0, cache_path=path)
    assert plan == solve_allocation(loss.costs, BUDGET)
    assert (report.finished, report.measured) == (False, 1)
    refine(loss.costs, BUDGET, loss, 5, seconds=0, cache_path=path)
    assert len(loss.calls) == 1


def test_a_search_that_is_cut_short_is_bounded_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss = Loss(9, layers=12)

    def slow(plan: Plan) -> float:
        time.sleep(0.02)
        return loss(plan)

    start = time.monotonic()
    plan, report = refine(loss.costs, 30, slow, 500, seconds=0.2, console=Console())
    assert time.monotonic() - start < 5
    assert 1 <= report.measured < 100
    assert not report.finished
    assert loss.value(tuple(plan)) == min(map(loss.value, loss.calls))
    assert "Warning: Refining was cut short after 0." in capsys.readouterr().err


def test_progress_and_gain_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    loss = Loss(4)
    _, report = refine(loss.costs, BUDGET, loss, 2, console=Console())
    told = capsys.readouterr().err
    assert f"Refining: {report.measured} plans in" in told
    assert f"loss {report.first_loss:.5g} -> {report.loss:.5g}" in told


def test_exchanges_stay_within_what_is_allowed() -> None:
    loss = Loss(6)
    prices = [4, 3, 2, 1]

    def allowed(plan: Plan) -> bool:
        return sum(price * k for price, k in zip(prices, plan, strict=True)) <= 20

    start = (2, 2, 2, 2)
    plan, report = search([start], [MOST] * LAYERS, loss, allowed=allowed)
    assert allowed(tuple(plan))
    assert all(map(allowed, loss.calls))
    assert report.loss <= loss.value(start)


def test_a_loss_that_is_no_number_is_rejected() -> None:
    with pytest.raises(ProfileError, match=r"plan 1 2 has a loss of nan"):
        refine([[1.0, 0.5], [1.0, 0.0]], 3, lambda _: math.nan, 1)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "losses": {"a": 3}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "losses.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"losses\.json holds no measured losses"):
        refine([[1.0]], 1, lambda _: 0.0, 1, cache_path=path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Measured losses can't be saved"):
        refine([[1.0]], 1, lambda _: 0.0, 1, cache_path=tmp_path / "missing" / "losses.json")
