"""Budgets that hold: a controller on plants of all kinds, then artifacts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.runtime.artifact.dial import DialCurve
from alloc_moe.runtime.artifact.plan import DialPoint
from alloc_moe.runtime.text.hold import CHUNK, WINDOW, Hold, parts

ORIGINAL, LAYERS = 48, 6
CURVE = DialCurve(
    tuple(
        DialPoint(*point)
        for point in [
            *((ORIGINAL, 0.0), (44.5, 0.0145), (37.5, 0.0246), (30.5, 0.0326), (24.0, 0.042)),
            *((20.0, 0.05), (16.5, 0.06), (13.0, 0.0757), (9.5, 0.105), (LAYERS, 0.514)),
        ]
    )
)
BUDGET = 24.0

Plant = Callable[[float, int], float]
"""``plant(price, token)`` -> the activations that the token needs in the mean at that price."""


def text(*, factor: float = 1.0, slope: float = 1.0) -> Plant:
    """A text that runs at a price what the dial says at another: ``factor * price ** slope``.

    The slope is around the price of the budget.
    """
    middle = CURVE.price(BUDGET)
    return lambda price, _: CURVE.activations(middle * (price / middle) ** slope / factor)


def ran(hold: Hold, plant: Plant, spans: list[int], *, noise: float = 0.0) -> np.ndarray:
    """Return the activations of each token of calls of so many tokens, and steer the price.

    As in `run_held`, a call may be computed again, in which each token is as far from the mean.
    """
    random = np.random.default_rng(5)
    counts: list[int] = []

    def call(tokens: int, more: np.ndarray) -> list[int]:
        means = [plant(hold.price, len(counts) + place) for place in range(tokens)]
        drawn = np.array(means) + more
        # Down and up in turns, so that what is rounded off doesn't add up.
        rest = np.diff(drawn.clip(LAYERS, ORIGINAL).cumsum().round(), prepend=0.0)
        return rest.astype(int).tolist()

    for tokens in spans:
        more = noise * BUDGET * random.standard_normal(tokens)
        new = call(tokens, more)
        if (price := hold.corrected(tokens, sum(new))) is not None:
            hold.price = price
            new = call(tokens, more)
        hold.observe(tokens, sum(new))
        counts += new
    return np.array(counts)


def window_means(counts: np.ndarray) -> np.ndarray:
    return np.convolve(counts, np.ones(WINDOW) / WINDOW, "valid")


PROMPT = [part.stop - part.start for part in parts(1024)]
DECODED = [1] * 1024


both = pytest.mark.parametrize("spans", [PROMPT, DECODED], ids=["prompt", "decoded"])


def errors(counts: np.ndarray, budget: float = BUDGET) -> np.ndarray:
    """Return by which share of the budget each window is off."""
    return np.abs(window_means(counts) / budget - 1)


@both
@settings(max_examples=25)
@given(factor=st.floats(0.85, 1.2), slope=st.floats(0.8, 1.6))
def test_every_window_is_within_two_percent(spans: list[int], factor: float, slope: float) -> None:
    assert errors(ran(Hold(CURVE, BUDGET), text(factor=factor, slope=slope), spans)).max() <= 0.02


@both
@settings(max_examples=25)
@given(factor=st.floats(0.7, 1.4), slope=st.floats(0.5, 2.5))
def test_nothing_swings(spans: list[int], factor: float, slope: float) -> None:
    counts = ran(Hold(CURVE, BUDGET), text(factor=factor, slope=slope), spans)
    assert errors(counts[2 * WINDOW :]).max() <= 0.005


@both
@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_noise_averages_out(spans: list[int], factor: float) -> None:
    off = errors(ran(Hold(CURVE, BUDGET), text(factor=factor), spans, noise=0.3))
    assert off.mean() <= 0.01
    assert off.max() <= 0.02


def test_without_steering_the_same_text_is_far_off() -> None:
    price = CURVE.price(BUDGET)
    assert text(factor=1.2)(price, 0) >= 1.15 * BUDGET


@both
@pytest.mark.parametrize("budget", [6.5, 7.0, 46.0])
def test_budgets_at_the_ends_of_the_dial_are_held(spans: list[int], budget: float) -> None:
    counts = ran(Hold(CURVE, budget), text(factor=1.15), spans)
    assert errors(counts[WINDOW:], budget).max() <= 0.02


def test_the_full_budget_runs_everything() -> None:
    hold = Hold(CURVE, ORIGINAL)
    ran(hold, text(factor=0.7), DECODED)
    assert hold.price == 0


def test_a_dial_without_prices_stays_as_it_is() -> None:
    hold = Hold(DialCurve((DialPoint(ORIGINAL, 0.0), DialPoint(LAYERS, 0.0))), BUDGET)
    hold.observe(8, 240)
    assert (hold.price, hold.mean) == (0, 30)


@both
def test_a_text_that_changes_is_held_again(spans: list[int]) -> None:
    plain, other = text(), text(factor=1.25)
    counts = ran(
        Hold(CURVE, BUDGET),
        lambda price, token: (other if token >= 512 else plain)(price, token),
        spans,
    )
    assert errors(counts[512 + CHUNK :]).max() <= 0.03
    assert errors(counts[512 + WINDOW :]).max() <= 0.01


@pytest.mark.parametrize("stuck", [LAYERS, ORIGINAL])
def test_what_cannot_be_met_is_not_made_up_for_without_end(stuck: int) -> None:
    plain = text()
    counts = ran(
        Hold(CURVE, BUDGET),
        lambda price, token: stuck if token < 2048 else plain(price, token),
        [1] * 4096,
    )
    assert errors(counts[2048 + 2 * WINDOW :]).max() <= 0.02


def test_no_token_changes_nothing() -> None:
    hold, other = Hold(CURVE, BUDGET), Hold(CURVE, BUDGET)
    for each in (hold, other):
        each.observe(8, 240)
    other.observe(0, 0)
    assert vars(hold) == vars(other)
    assert hold.mean == 30
    assert hold.price > CURVE.price(BUDGET)
    assert math.isnan(Hold(CURVE, BUDGET).mean)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [(1, [0]), (12, [0]), (13, [0, 12]), (24, [0, 12]), (50, [0, 12, 24, 48])],
)
def test_a_prompt_is_cut_into_pieces(tokens: int, starts: list[int]) -> None:
    found = parts(tokens)
    assert [part.start for part in found] == starts
    assert [part.stop for part in found] == [*starts[1:], tokens]


def test_a_piece_that_ran_far_too_much_is_computed_again_at_a_higher_price() -> None:
    hold = Hold(CURVE, BUDGET)
    as_wanted = round(12 * BUDGET)
    assert hold.corrected(12, as_wanted) is None
    more, less = (hold.corrected(12, round(part * as_wanted)) for part in (1.3, 0.7))
    assert more is not None
    assert less is not None
    assert less < hold.price < more
    # What the piece before left is paid back with it.
    hold.observe(12, round(1.15 * as_wanted))
    assert hold.corrected(12, round(0.85 * as_wanted)) is None
    assert hold.corrected(1, ORIGINAL) is None


def test_the_full_budget_computes_nothing_again() -> None:
    assert Hold(CURVE, ORIGINAL).corrected(12, 0) is None


def test_a_second_time_that_ended_farther_off_has_a_third_between_the_two() -> None:
    hold = Hold(CURVE, BUDGET)
    wanted = round(12 * BUDGET)
    first, near, far = (0.04, wanted + 40), (0.05, wanted - 10), (0.05, wanted - 60)
    assert hold.between(12, first, near) is None
    between = hold.between(12, first, far)
    assert between is not None
    assert 0.04 < between < 0.05
    assert hold.between(12, first, (0.05, wanted + 60)) == 0.04  # no price between is better
    assert hold.between(12, first, (0.05, wanted + 40)) is None


def test_the_full_budget_computes_nothing_a_third_time() -> None:
    assert Hold(CURVE, ORIGINAL).between(12, (0.0, 12 * ORIGINAL), (0.0, 12 * ORIGINAL)) is None
