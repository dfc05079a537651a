"""Plans and expert sizes that are improved by measuring them as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning import exchanges as refine
from alloc_moe.compiler.planning.allocation import parse_budget
from alloc_moe.compiler.planning.costs import CostTable
from alloc_moe.compiler.planning.divergence import Divergence
from alloc_moe.compiler.planning.knapsack import solve_allocation
from alloc_moe.compiler.planning.plan import expert_sizes, make_planned
from alloc_moe.compiler.planning.refinement import Refinement, refine_allocation, refine_sizes
from alloc_moe.compiler.planning.thresholds import Setting
from alloc_moe.compiler.records import PlanOptions, SensitivityProfile
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.console import Console

Models = Callable[[str], MoeModel]
Profiles = Callable[..., SensitivityProfile]

QUIET = Console(quiet=True)


@pytest.fixture
def small(calibration: CalibrationSet) -> CalibrationSet:
    return dataclasses.replace(calibration, ids=calibration.ids[:2], tokens=128)


@pytest.fixture
def misled(profile_of: Profiles) -> SensitivityProfile:
    """A profile that has it all wrong: what costs most is said to cost least."""
    profile = profile_of("olmoe", "fisher")
    rows = [np.array(row) for row in profile.costs if row is not None]
    worst = sorted(range(3), key=lambda layer: rows[layer][0])
    swapped = dict(zip(worst, reversed(worst), strict=True))
    return dataclasses.replace(
        profile, costs=tuple(tuple(rows[swapped[layer]].tolist()) for layer in range(3))
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is measured during the test."""
    calls: list[object] = []
    for name in ("of_allocation", "of_price"):
        original = getattr(Divergence, name)

        def record(
            self: Divergence, what: object, more: object, original: Callable[..., float] = original
        ) -> float:
            calls.append(what)
            return original(self, what, more)

        monkeypatch.setattr(Divergence, name, record)
    return calls


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search sees a second pass whenever it looks at the clock: as long on every machine."""
    ticks = itertools.count()
    monkeypatch.setattr(refine, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.mark.parametrize("redistribution", ["none", "batch", "threshold"])
def test_a_refined_allocation_diverges_no_more_than_the_best_by_sums(
    moe_model: Models,
    small: CalibrationSet,
    misled: SensitivityProfile,
    tmp_path: Path,
    redistribution: str,
) -> None:
    moe, setting = moe_model("olmoe"), Setting(redistribution)  # type: ignore[arg-type]
    first = solve_allocation([row for row in misled.costs if row], 6)
    ks, report = refine_allocation(
        moe,
        small,
        setting,
        Refinement(2, math.inf, 0, tmp_path / "refine.json"),
        profile=misled,
        activations=6,
        limit=None,
        costs=None,
        first=first,
        console=QUIET,
    )
    divergence = Divergence(moe, small)
    assert sum(ks) <= 6
    assert report.first_loss == divergence.of_allocation(first, setting)
    assert report.loss == divergence.of_allocation(ks, setting) <= report.first_loss
    assert report.finished


def test_a_refined_allocation_stays_within_its_cost(
    moe_model: Models, small: CalibrationSet, misled: SensitivityProfile, tmp_path: Path
) -> None:
    moe = moe_model("olmoe")
    costs = CostTable(
        "bytes", "bytes", 1, "float32", ((1.0, 2, 3, 4), (2.0, 4, 6, 8), (1.0, 2, 3, 4))
    )
    ks, report = refine_allocation(
        moe,
        small,
        Setting("none"),
        Refinement(2, math.inf, 0, tmp_path / "refine.json"),
        profile=misled,
        activations=6,
        limit=8.0,
        costs=costs,
        first=(2, 2, 2),
        console=QUIET,
    )
    assert costs.total(ks) <= 8
    assert report.loss <= report.first_loss
    assert report.starts == 1


@pytest.mark.usefixtures("ticking")
def test_refined_sizes_diverge_no_more_than_those_given(
    moe_model: Models, small: CalibrationSet, tmp_path: Path, counted: list[object]
) -> None:
    moe = moe_model("olmoe")
    # Sizes that starve the first layer and feed the last.
    skewed = tuple((10.0**layer,) * 8 for layer in range(3))
    setting = Setting("price", sizes=skewed)
    cut_short = Refinement(1, 20.0, 0, tmp_path / "refine.json")
    sizes, report = refine_sizes(moe, small, setting, cut_short, activations=6.0, console=QUIET)
    assert report.first_loss == Divergence(moe, small).of_price(setting, 6.0)
    refined = dataclasses.replace(setting, sizes=sizes)
    assert report.loss == Divergence(moe, small).of_price(refined, 6.0) < report.first_loss
    assert report.measured == len(counted) - 2
    # Only ratios between layers matter, so the layers' factors multiply to 1.
    factors = [new[0] / old[0] for new, old in zip(sizes, skewed, strict=True)]
    assert math.prod(factors) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("redistribution", ["batch", "price"])
def test_a_second_refinement_measures_nothing_again(
    moe_model: Models,
    small: CalibrationSet,
    profile_of: Profiles,
    tmp_path: Path,
    counted: list[object],
    redistribution: str,
) -> None:
    moe = moe_model("olmoe")
    seconds = 0.0 if redistribution == "price" else math.inf

    def plan() -> AllocationPlan:
        return make_planned(
            moe,
            small,
            parse_budget("0.5", [4, 4, 4]),
            PlanOptions(redistribution, correction="none", dial=False, overlaps=(0.5,)),  # type: ignore[arg-type]
            profile=profile_of("olmoe", "fisher"),
            console=QUIET,
            refinement=Refinement(2, seconds, 0, tmp_path / "refine.json"),
        ).plan

    first = plan()
    measured = len(counted)
    assert measured > 0
    assert set(first.sensitivity["refined"]) >= {"first_loss", "loss", "finished"}
    assert first.budget.activations <= 6
    second = plan()
    assert len(counted) == measured
    assert second == first
    assert AllocationPlan.from_json(second.to_json()) == second


def test_what_was_measured_otherwise_is_not_reused(
    moe_model: Models, small: CalibrationSet, profile_of: Profiles, tmp_path: Path
) -> None:
    moe, profile = moe_model("olmoe"), profile_of("olmoe", "fisher")
    measured = []
    for setting, text in (
        (Setting("none"), small),
        (Setting("none", "renorm"), small),
        (Setting("batch"), small),
        (Setting("none"), dataclasses.replace(small, sha256="1" * 64)),
        (Setting("none"), dataclasses.replace(small, seed=1)),
        (Setting("none"), small),
    ):
        _, report = refine_allocation(
            moe,
            text,
            setting,
            Refinement(1, 0.0, 0, tmp_path / "refine.json"),
            profile=profile,
            activations=6,
            limit=None,
            costs=None,
            first=(2, 2, 2),
            console=QUIET,
        )
        measured.append(report.measured)
    assert measured == [1, 1, 1, 1, 1, 0]


@pytest.mark.usefixtures("ticking")
def test_sizes_that_were_measured_with_other_token_sizes_are_measured_again(
    moe_model: Models, small: CalibrationSet, profile_of: Profiles, tmp_path: Path
) -> None:
    moe = moe_model("olmoe")
    sizes = expert_sizes("price", profile_of("olmoe", "fisher"), moe)
    hidden = moe.config.get_text_config().hidden_size
    one, other = (
        tuple(
            TokenSizes.of(np.full((hidden, layer.num_experts), value), np.zeros(layer.num_experts))
            for layer in moe.layers
        )
        for value in (0.1, -0.1)
    )
    measured = []
    for given in (None, one, other, other):
        setting = Setting("price", sizes=sizes, token_sizes=given)
        kept = Refinement(1, 0.0, 0, tmp_path / "refine.json")
        _, report = refine_sizes(moe, small, setting, kept, activations=6, console=QUIET)
        measured.append(report.measured)
    assert measured == [1, 1, 1, 0]


@pytest.mark.usefixtures("ticking")
def test_refined_sizes_are_those_of_the_plan(
    moe_model: Models, small: CalibrationSet, profile_of: Profiles, tmp_path: Path
) -> None:
    moe, profile = moe_model("olmoe"), profile_of("olmoe", "fisher")
    planned = make_planned(
        moe,
        small,
        parse_budget("0.5", [4, 4, 4]),
        PlanOptions("price", correction="none", dial=False),
        profile=profile,
        console=QUIET,
        refinement=Refinement(1, 15.0, 0, tmp_path / "refine.json"),
    )
    given = expert_sizes("price", profile, moe)
    assert given is not None
    factors = []
    for layer, sizes in zip(planned.plan.layers, given, strict=True):
        assert layer.sizes is not None
        ratios = np.array(layer.sizes) / np.array(sizes)
        np.testing.assert_allclose(ratios, ratios[0], rtol=2e-6)
        factors.append(ratios[0])
    assert math.prod(factors) == pytest.approx(1, rel=1e-4)
