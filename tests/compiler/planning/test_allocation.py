from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.compiler.errors import BudgetError, ProfileError
from alloc_moe.compiler.planning.allocation import (
    allocate,
    make_plan,
    parse_budget,
    uniform_allocation,
)
from alloc_moe.compiler.planning.costs import CostTable
from alloc_moe.compiler.records import MoeLayer, SensitivityProfile
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget


@pytest.mark.parametrize(
    ("requested", "activations"),
    [
        ("0.5", 15),
        ("0.1", 3),  # 0.1 * 30 is 3.0000000000000004 or 2.9999999999999996 in other orders
        (0.1, 3),
        ("0.7", 21),  # 0.7 * 30 is 20.999999999999996
        (0.7, 21),
        ("1.0", 30),
        ("1.", 30),
        (1.0, 30),
        (".25", 7),
        (" 0.5 ", 15),
        ("3", 3),
        ("30", 30),
        (12, 12),
    ],
)
def test_budget_is_a_fraction_or_a_count(requested: str | float, activations: int) -> None:
    budget = parse_budget(requested, [10, 10, 10])
    assert (budget.activations, budget.original) == (activations, 30)
    assert budget.requested == float(requested)
    assert isinstance(budget.requested, int) == ("." not in str(requested))


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("1", r"budget 1 means one activation per token, but there are 3 MoE layers.*1\.0"),
        ("2", r"budget 2 is below .* from 0\.1 to 1\.0, .* from 3 .* to 30"),
        (0, "budget 0 is below"),
        (-3, "budget -3 is below"),
        ("31", r"budget 31 is above .* to 30"),
        ("0.09", r"budget 0\.09 of 30 activations per token is 2, too few for 3 MoE layers"),
        ("1.5", r"budget 1\.5 is no fraction in \(0, 1\]"),
        ("0.0", r"budget 0\.0 is no fraction"),
        (-0.5, r"budget -0\.5 is no fraction"),
        ("50%", "budget '50%' is no positive number"),
        ("-0.5", "budget '-0.5' is no positive number"),
        ("nan", "budget 'nan' is no positive number"),
        (math.nan, "budget nan is no positive number"),
        (math.inf, "budget inf is no positive number"),
        ("half", "budget 'half' is no positive number"),
        ("", "budget '' is no positive number"),
        ("1e-1", "budget '1e-1' is no positive number"),
    ],
)
def test_budget_out_of_range_is_rejected(requested: str | float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(requested, [10, 10, 10])


def test_a_budget_below_one_each_is_rejected() -> None:
    with pytest.raises(BudgetError, match="1 activations are too few for 2 layers"):
        uniform_allocation([8, 8], 1)


def test_one_activation_is_legal_for_a_single_layer() -> None:
    assert parse_budget("1", [8]).activations == 1


def test_smallest_fraction_named_in_an_error_is_legal() -> None:
    with pytest.raises(BudgetError, match=r"from 0\.143 to"):
        parse_budget("0.1", [7, 7, 7])
    assert parse_budget("0.143", [7, 7, 7]).activations == 3


@pytest.mark.parametrize(
    ("experts", "budget", "expected"),
    [
        ([8] * 6, 24, [4] * 6),
        ([8] * 6, 27, [4, 5, 4, 5, 4, 5]),
        ([8] * 6, 48, [8] * 6),
        ([8] * 6, 6, [1] * 6),
        ([8, 2, 8], 15, [6, 2, 7]),
        ([8, 2, 8], 99, [8, 2, 8]),
    ],
)
def test_uniform_allocation(experts: list[int], budget: int, expected: list[int]) -> None:
    assert uniform_allocation(experts, budget) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 90))
def test_uniform_allocation_uses_all_it_can(experts: list[int], more: int) -> None:
    budget = len(experts) + more
    allocation = uniform_allocation(experts, budget)
    assert sum(allocation) == min(budget, sum(experts))
    assert all(1 <= k <= most for k, most in zip(allocation, experts, strict=True))
    growable = [k for k, most in zip(allocation, experts, strict=True) if k < most]
    assert all(k <= min(growable, default=k) + 1 for k in allocation)


LAYERS = tuple(MoeLayer(f"layers.{i}.mlp", f"layers.{i}.mlp.experts", i, 16, 3) for i in (1, 2))
PROFILE = SensitivityProfile(
    metric="kl",
    model_fingerprint="f",
    calibration_sha256="c",
    tokens=64,
    sequence_length=32,
    seed=7,
    layer_names=("layers.1.mlp", "layers.2.mlp"),
    experts_per_token=(3, 3),
    costs=((0.3, 0.2, 0.0), (9.0, 0.2, 0.0)),
    baseline_loss=2.0,
    seconds=1.0,
)


def plan(profile: SensitivityProfile | None, requested: str) -> AllocationPlan:
    return make_plan(
        LAYERS,
        parse_budget(requested, [3, 3]),
        source="model",
        profile=profile,
        redistribution="batch",
        weights="keep",
    )


def test_plan_follows_the_profile_and_says_where_it_comes_from() -> None:
    made = plan(PROFILE, "4")
    assert [layer.k for layer in made.layers] == [1, 3]
    assert [layer.name for layer in made.layers] == ["layers.1.mlp", "layers.2.mlp"]
    assert made.sensitivity == {
        "metric": "kl",
        "tokens": 64,
        "calibration_sha256": "c",
        "seed": 7,
    }
    assert AllocationPlan.from_json(made.to_json()) == made


def test_plan_without_profile_is_uniform() -> None:
    made = plan(None, "0.84")
    assert [layer.k for layer in made.layers] == [2, 3]
    assert made.sensitivity == {}


def test_plan_states_what_it_uses_of_the_budget() -> None:
    flat = dataclasses.replace(PROFILE, costs=((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    made = plan(flat, "5")
    assert [layer.k for layer in made.layers] == [1, 2]
    assert (made.budget.activations, made.budget.requested, made.budget.original) == (3, 5, 6)


def test_an_incomplete_profile_is_rejected() -> None:
    with pytest.raises(ProfileError, match="incomplete: 1 of 2 layers"):
        plan(dataclasses.replace(PROFILE, costs=((0.3, 0.2, 0.0), None)), "4")


def test_a_profile_of_other_layers_is_rejected() -> None:
    other = dataclasses.replace(PROFILE, layer_names=("layers.0.mlp", "layers.1.mlp"))
    with pytest.raises(ProfileError, match=r"2 MoE layers \(layers\.0\.mlp\.\.\., top-3\), but"):
        plan(other, "4")


def test_a_profile_survives_its_file() -> None:
    text = PROFILE.to_json()
    assert SensitivityProfile.from_json(text, path=Path("profile.json")) == PROFILE


# Experts of layer 1 use up ten times what those of layer 2 do.
TABLE = CostTable("bytes", "bytes", 1, "float16", ((100.0, 200.0, 300.0), (10.0, 20.0, 30.0)))


def priced_plan(profile: SensitivityProfile | None, requested: str) -> AllocationPlan:
    return make_plan(
        LAYERS,
        parse_budget(requested, [3, 3], kind="bytes"),
        source="model",
        profile=profile,
        redistribution="batch",
        weights="keep",
        costs=TABLE,
    )


def test_a_plan_under_a_cost_says_what_it_uses_of_it() -> None:
    made = priced_plan(PROFILE, "0.5")
    assert [layer.k for layer in made.layers] == [1, 3]
    assert made.budget == Budget(0.5, 4, 6)
    assert made.cost == {
        "kind": "bytes",
        "unit": "bytes",
        "batch": 1,
        "dtype": "float16",
        "limit": 165.0,
        "planned": 130.0,
        "original": 330.0,
    }
    assert AllocationPlan.from_json(made.to_json()) == made


def test_a_plan_of_activations_has_no_cost_in_its_file() -> None:
    assert '"cost"' not in plan(PROFILE, "4").to_json()


def test_expensive_layers_get_fewer_experts_than_activations_would_give() -> None:
    gains_by_cost = dataclasses.replace(PROFILE, costs=((0.9, 0.2, 0.0), (0.8, 0.3, 0.1)))
    assert [layer.k for layer in plan(gains_by_cost, "4").layers] == [2, 2]
    assert [layer.k for layer in priced_plan(gains_by_cost, "0.4").layers] == [1, 3]


@pytest.mark.parametrize(
    ("requested", "expected"), [("1.0", [3, 3]), ("0.7", [2, 3]), ("0.4", [1, 2])]
)
def test_a_uniform_plan_under_a_cost_uses_what_fits(requested: str, expected: list[int]) -> None:
    budget = parse_budget(requested, [3, 3], kind="bytes")
    found = allocate(None, LAYERS, budget, TABLE)
    assert found == expected
    assert TABLE.total(found) <= Fraction(requested) * TABLE.original


@given(
    st.lists(
        st.lists(st.floats(0.001, 10), min_size=3, max_size=3).map(tuple), min_size=2, max_size=2
    ).map(tuple),
    st.floats(0.01, 1.0),
)
def test_no_plan_exceeds_its_cost(prices: tuple[tuple[float, ...], ...], share: float) -> None:
    table = CostTable("latency", "ms", 1, "float32", prices)
    budget = parse_budget(share, [3, 3], kind="latency")
    limit = Fraction(Decimal(repr(share))) * sum(Fraction(row[-1]) for row in prices)
    for profile in (None, PROFILE):
        if table.cheapest > limit:
            with pytest.raises(BudgetError, match="one expert in each MoE layer takes"):
                allocate(profile, LAYERS, budget, table)
        else:
            assert table.total(allocate(profile, LAYERS, budget, table)) <= limit


def test_a_cost_no_plan_keeps_is_rejected() -> None:
    message = r"budget 0\.3 is 99 of 330 bytes, .* takes 110\. Give a fraction from 0\.334 to 1\.0"
    with pytest.raises(BudgetError, match=message):
        priced_plan(PROFILE, "0.3")
    assert [layer.k for layer in priced_plan(PROFILE, "0.334").layers] == [1, 1]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("4", r"budget 4 is a number of activations, which --cost latency can't count"),
        ("1.5", r"budget 1\.5 is no fraction in \(0, 1\]. .* of the original model's latency"),
        ("half", "budget 'half' is no positive number"),
    ],
)
def test_a_cost_is_budgeted_by_a_fraction(requested: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(requested, [3, 3], kind="latency")
