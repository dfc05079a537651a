"""Scales, labels and markers of the report's drawings."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.compiler.sweep.report.svg import (
    SHAPES,
    element,
    even_scale,
    marker,
    number,
    shorten,
    spread,
    symmetric_log,
    text,
)

amounts = st.floats(-10, 10).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(amounts, max_size=20))
def test_the_symmetric_scale_keeps_order_and_holds_every_value(values: list[float]) -> None:
    scale = symmetric_log(values)
    places = [scale.place(value) for value in sorted([0.0, *values])]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert 0.0 in scale.ticks()
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert len(scale.ticks()) < 30


def test_equal_ratios_are_equally_far_apart_above_the_knee() -> None:
    scale = symmetric_log([0.001, 0.1])
    steps = [scale.place(10.0**-d) for d in (3, 2, 1)]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])


def test_a_gain_lies_below_zero() -> None:
    scale = symmetric_log([-0.004, 0.02])
    assert scale.place(-0.004) < scale.place(0.0) < scale.place(0.02)


@given(st.lists(amounts, max_size=20))
def test_the_even_scale_keeps_order_and_holds_every_value(values: list[float]) -> None:
    scale = even_scale(values)
    places = [scale.place(value) for value in sorted([0.0, *values])]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert 0.0 in scale.ticks()
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert 3 <= len(scale.ticks()) <= 9


def test_even_ticks_are_round_and_as_exact_as_their_step() -> None:
    scale = even_scale([0.16])
    assert [scale.label(tick) for tick in scale.ticks()] == ["0", "+0.05", "+0.10", "+0.15"]
    scale = even_scale([-0.004, 0.006])
    minus = "\N{MINUS SIGN}"
    assert [scale.label(tick) for tick in scale.ticks()] == [
        *(f"{minus}0.004", f"{minus}0.002", "0", "+0.002", "+0.004", "+0.006")
    ]
    assert [even_scale([30.0]).label(tick) for tick in (0.0, 10.0)] == ["0", "+10"]


def test_symmetric_ticks_have_no_more_digits_than_they_need() -> None:
    scale = symmetric_log([0.001, 0.1])
    assert [scale.label(tick) for tick in (0.0, 0.001, 0.1)] == ["0", "+0.001", "+0.1"]


@given(st.lists(st.floats(-50, 250), max_size=12))
def test_labels_neither_touch_nor_leave_the_room(wanted: list[float]) -> None:
    placed = spread(wanted, gap=15, low=0, high=200)
    assert all(-1e-6 <= place <= 200 + 1e-6 for place in placed)
    gaps = [b - a for a, b in itertools.pairwise(sorted(placed))]
    assert all(gap >= 15 - 1e-6 for gap in gaps)
    by_wish = [placed[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])]
    assert by_wish == sorted(by_wish)


def test_too_many_labels_share_the_room_evenly() -> None:
    assert spread([5, 1, 3], gap=90, low=0, high=100) == [100, 0, 50]


def test_labels_with_room_stay_where_they_belong() -> None:
    assert spread([10, 100, 50], gap=15, low=0, high=200) == [10, 100, 50]


@given(st.floats(-1e4, 1e4))
def test_coordinates_are_short_and_exact_to_a_hundredth(value: float) -> None:
    assert math.isclose(float(number(value)), value, abs_tol=0.00501)
    assert number(value) != "-0"


def test_markup_in_text_is_escaped() -> None:
    assert text(1, 2, "<b>&\"'") == '<text x="1" y="2">&lt;b&gt;&amp;&quot;&#x27;</text>'
    assert element("g", {"class": '"><'}) == '<g class="&quot;&gt;&lt;"/>'


def test_every_shape_can_be_drawn_and_differs() -> None:
    assert len({marker(shape, 0, 0, 5) for shape in SHAPES}) == len(SHAPES)


def test_long_labels_are_cut() -> None:
    assert shorten("price", 5) == "price"
    assert len(shorten("price + affine", 8)) <= 8
