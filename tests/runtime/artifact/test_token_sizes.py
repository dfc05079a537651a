"""Token sizes as the plan's JSON holds them."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.errors import ArtifactError

EXPERTS, HIDDEN = 3, 5


def planned(token_sizes: TokenSizes | None) -> AllocationPlan:
    layer = PlannedLayer("l.0", EXPERTS, 2, 1.5, sizes=(1.0, 2.0, 0.5), token_sizes=token_sizes)
    return AllocationPlan("m", Budget(0.5, 1.5, 2), "price", "keep", (layer,), price=0.1)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_arrays_come_back_as_float16_has_them(hidden: int, experts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights, bias = random.normal(size=(hidden, experts)), random.normal(size=experts)
    stored = TokenSizes.of(weights, bias)
    assert stored.fits(experts)
    assert not stored.fits(experts + 1)
    for found, given_array in zip(stored.arrays, (weights, bias), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, given_array.astype(np.float16))
    # What was read can be stored again without a change.
    assert TokenSizes.of(*stored.arrays) == stored


@pytest.mark.parametrize("value", [1e6, -1e6, np.nan, np.inf])
def test_what_float16_does_not_hold_is_no_weight(value: float) -> None:
    weights = np.zeros((HIDDEN, EXPERTS))
    weights[2, 1] = value
    with pytest.raises(ValueError, match="beyond float16"):
        TokenSizes.of(weights, np.zeros(EXPERTS))


def test_a_plan_has_them_in_its_json_and_is_the_same_without() -> None:
    random = np.random.default_rng(0)
    stored = TokenSizes.of(random.normal(size=(HIDDEN, EXPERTS)), random.normal(size=EXPERTS))
    plan = planned(stored)
    assert AllocationPlan.from_json(plan.to_json()) == plan
    without = json.loads(planned(None).to_json())
    assert "token_sizes" not in without["layers"][0]
    data = json.loads(plan.to_json())
    assert data["layers"][0].pop("token_sizes") == dataclasses.asdict(stored)
    assert data == without


def in_base64(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f2").tobytes()).decode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": HIDDEN + 1},
        {"hidden": 0},
        {"hidden": 1.5},
        {"values": ""},
        {"values": 7},
        {"values": "no base64!"},
        {"values": in_base64(*[0] * 17)},
        {"values": in_base64(*[0] * 17, np.nan)},
    ],
    ids=str,
)
def test_a_plan_whose_token_sizes_fit_no_layer_is_refused(wrong: dict[str, Any]) -> None:
    right = {"hidden": HIDDEN, "values": in_base64(*[0] * 18)}
    data = json.loads(planned(None).to_json())
    data["layers"][0]["token_sizes"] = right
    assert AllocationPlan.from_json(json.dumps(data)).layers[0].token_sizes is not None
    data["layers"][0]["token_sizes"] = right | wrong
    with pytest.raises(ArtifactError, match=r"The allocation plan can't be read.*token_sizes"):
        AllocationPlan.from_json(json.dumps(data))
