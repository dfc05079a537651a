"""The choices of a frontier against all that there are."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.planning.goals.frontier import Frontier

Rows = list[list[float]]


@st.composite
def frontiers(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Bytes and costs of up to four rows of up to six choices."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    number = st.integers(0, 40).map(lambda n: n / 8)
    rows = [
        [draw(st.lists(number, min_size=length, max_size=length)) for length in lengths]
        for _ in range(2)
    ]
    return rows[0], rows[1]


def every(nbytes: Rows, costs: Rows) -> list[tuple[float, float]]:
    """Return bytes and cost of every choice."""
    indices = itertools.product(*(range(len(row)) for row in nbytes))
    return [
        (
            sum(row[i] for row, i in zip(nbytes, choice, strict=True)),
            sum(row[i] for row, i in zip(costs, choice, strict=True)),
        )
        for choice in indices
    ]


@settings(max_examples=150, deadline=None)
@given(frontiers(), st.integers(0, 160))
def test_the_least_cost_within_bytes_equals_brute_force(
    rows: tuple[Rows, Rows], eighths: int
) -> None:
    nbytes, costs = rows
    limit = eighths / 8
    within = [(cost, read) for read, cost in every(nbytes, costs) if read <= limit]
    frontier = Frontier(nbytes, costs)
    if not within:
        with pytest.raises(BudgetError):
            frontier.within(limit)
        return
    found = frontier.within(limit)
    assert (found.cost, found.nbytes) == min(within)
    chosen = [row[choice - 1] for row, choice in zip(nbytes, found.choices, strict=True)]
    assert sum(map(Fraction, chosen)) == found.nbytes


@settings(max_examples=150, deadline=None)
@given(frontiers(), st.integers(0, 160))
def test_the_fewest_bytes_within_a_cost_equal_brute_force(
    rows: tuple[Rows, Rows], eighths: int
) -> None:
    nbytes, costs = rows
    limit = eighths / 8
    within = [(read, cost) for read, cost in every(nbytes, costs) if cost <= limit]
    found = Frontier(nbytes, costs).costing(limit)
    if found is None:
        assert not within
    else:
        assert (found.nbytes, found.cost) == min(within)


@settings(max_examples=50, deadline=None)
@given(frontiers())
def test_the_best_choice_costs_least_of_all(rows: tuple[Rows, Rows]) -> None:
    found = Frontier(*rows).best()
    assert (found.cost, found.nbytes) == min((cost, read) for read, cost in every(*rows))
