"""Means, ranks and the headline of a report."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import pytest

from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.data import Digest, headline, loss, percent, share, signed

PLAIN, OWN = "uniform k", "price + affine (default)"


def with_losses(results: SweepResults, losses: dict[str, list[float]]) -> SweepResults:
    """Return results of one cell per method and seed at half the experts, all on budget."""
    template = results.cells[0]
    cells = [
        dataclasses.replace(
            template,
            method=method,
            budget=0.5,
            seed=seed,
            allocation="uniform" if method == PLAIN else "price",
            added_loss=value,
            loss=results.full_loss + value,
            activations=0.5 * results.full_activations,
            default=method == OWN,
        )
        for method, values in losses.items()
        for seed, value in enumerate(values)
    ]
    return dataclasses.replace(results, cells=tuple(cells))


@pytest.fixture
def results(synthetic_sweep: ModuleType) -> SweepResults:
    made: SweepResults = synthetic_sweep.synthetic_sweep(seeds=(0,))
    return made


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {PLAIN: [0.03], OWN: [0.0123]},
            "At half the experts, price + affine loses 0.0123 nats; uniform k loses 0.0300: "
            "59 % of the loss recovered",
        ),
        ({OWN: [0.0123]}, "At half the experts, price + affine loses 0.0123 nats"),
        ({"top-p": [0.02], "ratio": [0.01]}, "At half the experts, ratio loses 0.0100 nats"),
        (
            {PLAIN: [0.01], OWN: [0.0123]},
            "At half the experts, price + affine loses 0.0123 nats; uniform k loses 0.0100: "
            "0.0023 nats more",
        ),
        (
            {PLAIN: [0.01], OWN: [-0.002]},
            "At half the experts, price + affine is 0.0020 nats better than the full model; "
            "uniform k loses 0.0100: more than all of the loss recovered",
        ),
        (
            {PLAIN: [-0.001], OWN: [-0.002]},
            "At half the experts, price + affine is 0.0020 nats better than the full model; "
            "uniform k gains 0.0010: 0.0010 nats gained",
        ),
        (
            {PLAIN: [0.012, 0.014], OWN: [0.0123, 0.0133]},
            "At half the experts, price + affine loses 0.0128 nats; uniform k loses 0.0130: "
            "no more than the seeds differ",
        ),
        ({}, "The sweep holds no finite result"),
    ],
)
def test_the_headline_says_what_was_found(
    results: SweepResults, losses: dict[str, list[float]], expected: str
) -> None:
    assert headline(Digest(with_losses(results, losses))) == expected


def test_a_summary_is_mean_and_range_over_seeds(results: SweepResults) -> None:
    summary = Digest(with_losses(results, {OWN: [0.01, 0.02, 0.06]})).get(OWN, 0.5)
    assert summary is not None
    assert summary.added.mean == pytest.approx(0.03)
    assert (summary.added.low, summary.added.high) == (0.01, 0.06)
    assert summary.added.half_spread == pytest.approx(0.025)


def test_losses_that_are_not_finite_are_left_out(results: SweepResults) -> None:
    digest = Digest(with_losses(results, {OWN: [0.01, math.nan], PLAIN: [math.nan, math.inf]}))
    summary = digest.get(OWN, 0.5)
    assert summary is not None
    assert summary.added.mean == 0.01
    assert digest.get(PLAIN, 0.5) is None
    assert digest.methods == (OWN, PLAIN)  # the one without a result last
    # A mean without its failures is compared with nobody's.
    assert summary.remark == "1 of 2 seeds not finite"
    assert digest.best(0.5) is None


def test_methods_come_from_best_to_worst(results: SweepResults) -> None:
    digest = Digest(with_losses(results, {"b": [0.02], "a": [0.02], "c": [-0.01], "d": [0.5]}))
    assert digest.methods == ("c", "a", "b", "d")


def test_a_method_that_overspent_is_not_the_best(results: SweepResults) -> None:
    made = with_losses(results, {OWN: [0.01], "top-p": [0.001]})

    def spend(cell: Cell, factor: float) -> Cell:
        return dataclasses.replace(cell, activations=cell.activations * factor)

    for factor, best in ((1.019, "top-p"), (1.021, OWN)):
        cells = (made.cells[0], spend(made.cells[1], factor))
        summary = Digest(dataclasses.replace(made, cells=cells)).best(0.5)
        assert summary is not None
        assert summary.method == best


def test_the_reference_is_the_default_methods_budget_nearest_to_half(
    results: SweepResults,
) -> None:
    cells = [cell for cell in results.cells if not (cell.default and cell.budget in (0.5, 0.625))]
    digest = Digest(dataclasses.replace(results, cells=tuple(cells)))
    assert digest.reference == 0.375
    assert digest.get(OWN, 0.5) is None


def test_decoding_is_compared_with_the_full_model(results: SweepResults) -> None:
    made = with_losses(results, {OWN: [0.01]})
    cell = dataclasses.replace(made.cells[0], loss_decode=made.full_loss + 0.25)
    summary = Digest(dataclasses.replace(made, cells=(cell,))).get(OWN, 0.5)
    assert summary is not None
    assert summary.decode is not None
    assert summary.decode.mean == pytest.approx(0.25)


def test_numbers_are_written_for_people() -> None:
    assert [share(0.5), share(0.375)] == ["half the experts", "37.5 % of the experts"]
    assert [percent(0.5), percent(1 / 3), percent(1.0)] == ["50 %", "33.3 %", "100 %"]
    assert [loss(0.01234), loss(-0.00001)] == ["0.0123", "0.0000"]
    assert [signed(0.01234), signed(-0.00001)] == ["+0.0123", "+0.0000"]
    assert signed(-0.0123, minus="-") == "-0.0123"
    assert signed(-0.0123) == "\N{MINUS SIGN}0.0123"
