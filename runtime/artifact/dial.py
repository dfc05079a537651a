"""From a budget to the price of an activation, for artifacts with a dial.

The plan lists prices and the mean activations per token that they gave on the calibration text.
"""

from __future__ import annotations

import itertools
import math
import numbers
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

from alloc_moe.runtime.artifact.plan import AllocationPlan, DialPoint
from alloc_moe.runtime.errors import GenerationError

Price = float | tuple[float, ...] | None
"""Of an activation: one of a call, one per sequence, or the one compiled in."""

_NEAR = 0.01  # activations


@dataclass(frozen=True)
class DialCurve:
    """Mean activations per token on the calibration text, and the price that gives them.

    ``points`` are those of the dial by falling activations and rising prices, from the full model
    at price 0 on. Between them the logarithm of the price is linear in the activations.
    """

    points: tuple[DialPoint, ...]

    @classmethod
    def of(cls, plan: AllocationPlan) -> DialCurve:
        """Return that of a plan.

        Raises:
            GenerationError: The plan has no dial.
        """
        if not plan.takes_price or not plan.dial:
            raise GenerationError(
                "The artifact's budget is compiled in: its plan has no dial. "
                "Compile it with --redistribute price and no cap, or leave the budget out."
            )
        return cls(tuple(_points(plan)))

    @property
    def original(self) -> int:
        """The activations of the full model."""
        return int(self.points[0].activations)

    @property
    def least(self) -> float:
        """The fewest activations on the dial."""
        return self.points[-1].activations

    def price(self, activations: float) -> float:
        """Return the price that gives activations from `least` to `original`."""
        for above, below in itertools.pairwise(self.points):
            if activations == above.activations:
                return above.price
            if activations > below.activations:
                share = (above.activations - activations) / (above.activations - below.activations)
                if above.price == 0:  # it has no logarithm
                    return share * below.price
                # By logarithms: of a price that is almost zero the quotient would overflow.
                logarithm = (1 - share) * math.log(above.price) + share * math.log(below.price)
                return min(max(math.exp(logarithm), above.price), below.price)
        return self.points[-1].price

    def activations(self, price: float) -> float:
        """Return the activations that a price gives, `least` for all beyond the dial."""
        for above, below in itertools.pairwise(self.points):
            if price >= below.price:
                continue
            if above.price == 0:
                share = price / below.price
            else:
                span = math.log(below.price) - math.log(above.price)
                share = (math.log(price) - math.log(above.price)) / span
            return above.activations + share * (below.activations - above.activations)
        return self.least


def price_of(plan: AllocationPlan, budget: str | float) -> float:
    """Return the price at which a plan's artifact executes a budget in the mean.

    A higher budget never has a higher price, see `DialCurve`.

    Args:
        plan: A plan with a dial.
        budget: A fraction of the full model's activations in (0, 1] (text with a decimal point, or
            a float), rounded down to whole activations; or a whole number of activations per token
            over all layers (text of digits, or an int). ``1.0`` is the full model, at price 0.

    Raises:
        GenerationError: The plan has no dial, or the budget is none, or outside of it.
    """
    curve = DialCurve.of(plan)
    return curve.price(activations_of(curve, budget))


def activations_of(curve: DialCurve, budget: str | float) -> int:
    """Return the activations per token that a budget is; errors are those of `price_of`."""
    # A last point of 6.0001 is that of 6: prices meet what was asked for as well as text lets them.
    least, original = curve.least - _NEAR, curve.original
    legal = (
        f"Give a fraction from {_fraction_up(least, original)} to 1.0, or a whole number of "
        f"activations from {math.ceil(least)} to {original} (the full model)."
    )
    activations = _activations(budget, original, legal)
    if not least <= activations <= original:
        side = "below" if activations < least else "above"
        raise GenerationError(
            f"The budget {budget} is {activations} of {original} activations per token, {side} "
            f"the artifact's dial. {legal}"
        )
    return activations


def _points(plan: AllocationPlan) -> list[DialPoint]:
    """The dial by falling activations and rising prices, from the full model on."""
    full = DialPoint(plan.budget.original, 0.0)
    points = [full]
    for point in sorted(plan.dial, key=lambda point: (-point.activations, point.price)):
        if point.activations < points[-1].activations and point.price >= points[-1].price:
            points.append(point)
    return points


def _activations(budget: str | float, original: int, legal: str) -> int:
    """The whole number that a budget stands for; digits with a decimal point are a fraction."""
    number: int | Fraction | None = None
    if isinstance(budget, np.ndarray) and budget.ndim == 0:
        budget = budget[()]
    if isinstance(budget, bool):
        pass
    elif isinstance(budget, numbers.Integral):
        number = int(budget)
    elif isinstance(budget, numbers.Real):
        # As it is written: 0.7 in 32 bits is a little less, which would round down to less.
        number = Fraction(Decimal(str(budget))) if math.isfinite(budget) else None
    elif not isinstance(budget, str):
        pass
    elif re.fullmatch(r"\d{1,18}", text := budget.strip(), re.ASCII):
        number = int(text)
    elif re.fullmatch(r"\d{1,18}\.\d*|\.\d+", text, re.ASCII):
        number = Fraction(text)
    if number is None:
        raise GenerationError(f"The budget {budget!r} is no positive number. {legal}")
    if isinstance(number, int):
        return number
    if not 0 < number <= 1:
        raise GenerationError(f"The budget {budget} is no fraction in (0, 1]. {legal}")
    return math.floor(number * original)


def _fraction_up(activations: float, original: int) -> float:
    """The least fraction of three digits that is enough, after rounding down, for activations."""
    return math.ceil(Fraction(math.ceil(activations), original) * 1000) / 1000
