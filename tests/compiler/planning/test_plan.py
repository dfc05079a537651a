"""Whole plans: what holds for each redistribution, whatever was measured on the way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.correction.trials import CorrectionTrials
from alloc_moe.compiler.errors import BudgetError, ProfileError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.divergence import Divergence
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.planning.thresholds import Setting
from alloc_moe.compiler.records import (
    SCORED,
    Planned,
    PlanOptions,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import layer_parameters
from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.console import Console

Models = Callable[[str], MoeModel]
Profiles = Callable[..., SensitivityProfile]
Make = Callable[..., Planned]

REDISTRIBUTIONS: tuple[Redistribution, ...] = get_args(Redistribution)


@pytest.fixture(autouse=True)
def every_correction_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On so little text it is chance which corrections lower the loss."""
    monkeypatch.setattr(CorrectionTrials, "losses", lambda *_, **__: torch.zeros(2))


@pytest.fixture
def make(moe_model: Models, calibration: CalibrationSet, profile_of: Profiles) -> Make:
    """Return a function from a budget and options to a plan of a small model."""

    def run(
        budget: str,
        redistribution: Redistribution,
        *,
        metric: str | None = "fisher",
        token_sizes: bool = False,
        text: CalibrationSet = calibration,
        console: Console | None = None,
        **options: Any,
    ) -> Planned:
        moe = moe_model("olmoe")
        profile = None if metric is None else profile_of("olmoe", metric)
        sizes, quiet = expert_sizes("price", profile, moe) or (), Console(quiet=True)
        return make_planned(
            moe,
            text,
            parse_budget(budget, [layer.experts_per_token for layer in moe.layers]),
            PlanOptions(redistribution, **options),
            profile=profile,
            token_sizes=fit_token_sizes(moe, text, sizes, quiet) if token_sizes else None,
            console=console or Console(quiet=True),
        )

    return run


def executed(moe: MoeModel, planned: Planned, calibration: CalibrationSet) -> list[float]:
    """Return the experts per token that the model runs in each layer under a plan."""
    plan = planned.plan
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            layer_parameters(plan),
            redistribution=plan.redistribution,  # type: ignore[arg-type]
            weights=plan.weights,  # type: ignore[arg-type]
            corrections=planned.corrections,
        ) as activations,
    ):
        moe.model(input_ids=torch.from_numpy(calibration.ids))
    return activations.per_token


@pytest.mark.parametrize("weights", ["keep", "renorm"])
@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_a_plan_runs_what_it_says(
    make: Make,
    moe_model: Models,
    calibration: CalibrationSet,
    redistribution: Redistribution,
    weights: str,
) -> None:
    planned = make("0.5", redistribution, weights=weights, dial=False)
    plan, moe = planned.plan, moe_model("olmoe")
    assert plan.source == moe.checkpoint.source
    assert (plan.redistribution, plan.weights) == (redistribution, weights)
    assert (plan.budget.requested, plan.budget.original) == (0.5, 12)
    assert sum(layer.k for layer in plan.layers) == plan.budget.activations <= 6
    assert all(1 <= layer.k <= layer.k_original == 4 for layer in plan.layers)
    assert executed(moe, planned, calibration) == pytest.approx([la.k for la in plan.layers])
    assert plan.budget.activations > 5.9
    assert (plan.sensitivity["metric"], plan.sensitivity["tokens"]) == ("fisher", 512)
    assert (plan.correction["mode"], len(plan.correction["layers"])) == ("affine", 3)
    assert plan.correction["layers"] == ["affine"] * 3
    assert all(
        correction is not None and correction.bias is not None for correction in planned.corrections
    )
    assert AllocationPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_a_plan_has_what_its_redistribution_needs_and_no_more(
    make: Make, redistribution: Redistribution
) -> None:
    plan = make("0.6", redistribution, correction="none").plan
    scored, by_price = redistribution in SCORED, redistribution == "price"
    for layer in plan.layers:
        assert (layer.threshold is not None) == (scored and not by_price)
        assert (layer.sizes is not None) == by_price
        assert scored or isinstance(layer.k, int)
    assert (plan.price is not None) == bool(plan.dial) == by_price
    assert plan.correction == {}
    assert len({layer.threshold for layer in plan.layers}) == (
        3 if redistribution == "threshold" else 1
    )
    assert AllocationPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_the_full_budget_keeps_all_on_any_text(
    make: Make, moe_model: Models, calibration: CalibrationSet, redistribution: Redistribution
) -> None:
    planned = make("1.0", redistribution, dial=False)
    assert [layer.k for layer in planned.plan.layers] == [4, 4, 4]
    assert planned.plan.budget.activations == 12
    assert planned.plan.correction == {}
    assert planned.corrections == (None, None, None)
    other = dataclasses.replace(calibration, ids=calibration.ids[:, ::-1].copy())
    assert executed(moe_model("olmoe"), planned, other) == [4, 4, 4]
    assert AllocationPlan.from_json(planned.plan.to_json()) == planned.plan


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_the_least_budget_keeps_one_expert_per_layer(
    make: Make, redistribution: Redistribution
) -> None:
    plan = make("3", redistribution, correction="none", dial=False).plan
    assert [layer.k for layer in plan.layers] == [1, 1, 1]


def test_the_full_budget_is_spent_where_the_profile_says_that_less_is_better(
    moe_model: Models, calibration: CalibrationSet, profile_of: Profiles
) -> None:
    profile = profile_of("olmoe", "fisher")
    odd = dataclasses.replace(profile, costs=((0.0, 0.0, 0.0, 1.0),) * 3)
    for redistribution in REDISTRIBUTIONS:
        planned = make_planned(
            moe_model("olmoe"),
            calibration,
            parse_budget("1.0", [4, 4, 4]),
            PlanOptions(redistribution, dial=False),
            profile=odd,
            console=Console(quiet=True),
        )
        assert planned.plan.budget.activations == 12


def test_a_common_threshold_spends_what_the_allocation_would_leave(
    moe_model: Models, calibration: CalibrationSet, profile_of: Profiles
) -> None:
    # Costs per number of experts say nothing about single tokens' experts.
    odd = dataclasses.replace(profile_of("olmoe", "fisher"), costs=((0.0, 0.0, 0.0, 1.0),) * 3)
    planned = make_planned(
        moe_model("olmoe"),
        calibration,
        parse_budget("0.5", [4, 4, 4]),
        PlanOptions("price", correction="none", dial=False),
        profile=odd,
        console=Console(quiet=True),
    )
    assert 5.9 < planned.plan.budget.activations <= 6


@pytest.mark.parametrize("metric", ["kl", "ppl-suffix"])
def test_a_metric_without_sizes_cant_set_a_price(make: Make, metric: str) -> None:
    with pytest.raises(ProfileError, match=f"expert sizes, which the metric {metric} doesn't"):
        make("0.5", "price", metric=metric)


def test_without_a_profile_all_experts_have_one_size(make: Make) -> None:
    plan = make("0.5", "price", metric=None, correction="none", dial=False).plan
    assert {layer.sizes for layer in plan.layers} == {(1.0,) * 8}
    assert plan.sensitivity == {}
    assert plan.budget.activations <= 6


def test_the_overlap_of_the_least_divergence_is_taken(
    make: Make, moe_model: Models, calibration: CalibrationSet, profile_of: Profiles
) -> None:
    sizes = make("0.5", "price", dial=False, correction="none").plan
    measured = Divergence(moe_model("olmoe"), calibration)
    rows = tuple(layer.sizes for layer in sizes.layers if layer.sizes)
    found = {
        overlap: measured.of_price(Setting("price", sizes=rows, overlap=overlap), 6)
        for overlap in (0.0, 0.5, 1.0)
    }
    for tried in itertools.permutations(found):
        plan = make("0.5", "price", dial=False, correction="none", overlaps=tried).plan
        assert (plan.overlap or 0.0) == min(found, key=lambda overlap: found[overlap])
    assert make("0.5", "price", dial=False, correction="none", overlaps=(0.7,)).plan.overlap == 0.7
    assert make("1.0", "price", dial=False, overlaps=(0.0, 0.7)).plan.overlap == 0.7


@pytest.mark.parametrize("correction", ["none", "affine"])
def test_a_plan_with_token_sizes_runs_what_it_says(
    make: Make, moe_model: Models, calibration: CalibrationSet, correction: str
) -> None:
    planned = make("0.5", "price", token_sizes=True, correction=correction)
    plan, moe = planned.plan, moe_model("olmoe")
    assert all(layer.token_sizes is not None for layer in plan.layers)
    assert 5.9 < plan.budget.activations <= 6
    assert executed(moe, planned, calibration) == pytest.approx([la.k for la in plan.layers])
    assert AllocationPlan.from_json(plan.to_json()) == plan
    plain = make("0.5", "price", correction=correction).plan
    assert [layer.sizes for layer in plan.layers] == [layer.sizes for layer in plain.layers]
    assert plan.price != plain.price


def test_without_a_profile_layers_share_evenly(make: Make) -> None:
    assert [layer.k for layer in make("0.5", "batch", metric=None).plan.layers] == [2, 2, 2]


def test_a_capped_plan_has_no_dial_and_says_so(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make("0.5", "price", correction="none", cap=1.25, console=Console()).plan
    assert (plan.cap, plan.dial) == (1.25, ())
    assert "A capped artifact has a fixed budget" in capsys.readouterr().err
    assert {given.cap for given in layer_parameters(plan)} == {1.25}
    assert AllocationPlan.from_json(plan.to_json()) == plan


def test_a_cap_changes_nothing_that_is_measured(make: Make) -> None:
    capped = make("0.5", "threshold", cap=1.0)
    free = make("0.5", "threshold")
    assert dataclasses.replace(capped.plan, cap=None) == free.plan
    assert same_corrections(capped, free)


def test_the_dial_is_measured_with_the_corrections_that_run(
    make: Make, moe_model: Models, calibration: CalibrationSet
) -> None:
    planned = make("0.5", "price")
    plan, moe = planned.plan, moe_model("olmoe")
    assert plan.dial[0].activations == 12
    assert plan.dial[0].price == 0
    for point, following in itertools.pairwise(plan.dial):
        assert point.activations > following.activations
        assert point.price < following.price
    for point in plan.dial[1::4]:
        at_point = dataclasses.replace(plan, price=point.price)
        ran = executed(moe, dataclasses.replace(planned, plan=at_point), calibration)
        assert point.activations == pytest.approx(sum(ran), rel=1e-12)


def test_a_single_window_is_enough(make: Make, calibration: CalibrationSet) -> None:
    short = dataclasses.replace(calibration, ids=calibration.ids[:1], tokens=64)
    planned = make("0.5", "threshold", text=short)
    assert planned.plan.correction["mode"] == "affine"
    assert planned.plan.budget.activations <= 6


def test_a_budget_below_one_per_layer_is_told(make: Make) -> None:
    with pytest.raises(BudgetError, match="too few"):
        make("0.1", "none")


def same_corrections(first: Planned, second: Planned) -> bool:
    """Whether all corrections are the same, bit for bit."""
    return all(
        (one is None) == (other is None)
        and (
            one is None
            or (
                np.array_equal(one.scale, other.scale)
                and (one.bias is None) == (other.bias is None)
                and (one.bias is None or np.array_equal(one.bias, other.bias))
            )
        )
        for one, other in zip(first.corrections, second.corrections, strict=True)
    )


@pytest.mark.parametrize("redistribution", ["batch", "threshold", "price"])
def test_the_same_inputs_give_the_same_plan(make: Make, redistribution: Redistribution) -> None:
    first, second = make("0.5", redistribution), make("0.5", redistribution)
    assert first.plan.to_json() == second.plan.to_json()
    assert same_corrections(first, second)
    assert any(correction is not None for correction in first.corrections)
