"""Plans by the bytes that a token reads and by what they cost the loss: the best of each.

A frontier is a multiple-choice knapsack: of every row one choice is taken. Rows are MoE layers, and
their choices all k in the fewest bits, then all k in the next. Where one number of activations
decides all, as for a common price, there is one row, of all such numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alloc_moe.compiler.errors import BudgetError
from alloc_moe.compiler.planning.knapsack import solve_costs

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Choice:
    """One choice of each row, counted from 1, and the sums of their bytes and costs."""

    choices: tuple[int, ...]
    nbytes: float
    cost: float


@dataclass(frozen=True)
class Frontier:
    """``nbytes[r][c]`` is what choice c of row r reads, ``costs[r][c]`` what it costs the loss."""

    nbytes: Rows
    costs: Rows

    @property
    def least(self) -> float:
        """The bytes of the choice that reads least."""
        return sum(map(min, self.nbytes))

    def within(self, nbytes: float) -> Choice:
        """Return the choice that costs least of those that read so much at most, exactly.

        Of equal costs the fewest bytes are taken.

        Raises:
            BudgetError: All of them read more.
        """
        return self._choice(solve_costs(self.costs, self.nbytes, nbytes))

    def costing(self, cost: float) -> Choice | None:
        """Return the choice that reads least of those that cost so much at most, exactly.

        Of equal bytes the least cost is taken. None if all of them cost more.
        """
        try:
            return self._choice(solve_costs(self.nbytes, self.costs, cost))
        except BudgetError:
            return None

    def best(self) -> Choice:
        """Return the choice of the least cost, of equal costs the one of the fewest bytes."""
        return self.within(sum(map(max, self.nbytes)))

    def _choice(self, choices: Sequence[int]) -> Choice:
        def total(rows: Rows) -> float:
            return sum(row[choice - 1] for row, choice in zip(rows, choices, strict=True))

        return Choice(tuple(choices), total(self.nbytes), total(self.costs))
