"""Numbers on the command line: whole or finite, and no larger than anything real."""

from __future__ import annotations

import os
import re
from typing import Any

import click

MOST_TOKENS = 1 << 20
"""The most tokens in one sequence or call; no model's context is longer."""
MOST_TEXT = 1 << 40
"""The most tokens of a text."""
MOST_SEED = 2**63 - 1
MOST_RUNS = 100_000
_BUDGET = re.compile(r"\d{1,18}(\.\d{0,40})?|\.\d{1,40}", re.ASCII)
_THREADS_PER_CORE = 8


class WholeFrom(click.IntRange):
    """A whole number from a least one on.

    What is above the guard is larger than anything real: refused, but no news for ``--help``.
    """

    def __init__(self, least: int, guard: int) -> None:
        super().__init__(least)
        self._guard = guard

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number, or fail as click does."""
        number = int(super().convert(value, param, ctx))
        if number > self._guard:
            self.fail(f"{number} is more than {self._guard}, the most there can be.", param, ctx)
        return number


class FiniteRange(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number, or fail as click does."""
        number = click.FLOAT.convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is no number.", param, ctx)
        return float(super().convert(value, param, ctx))


class FiniteFrom(FiniteRange):
    """A number from a least one on, as `WholeFrom`; `above` leaves that one out."""

    def __init__(self, least: float, guard: float, *, above: bool = False) -> None:
        super().__init__(least, min_open=above)
        self._guard = guard

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number, or fail as click does."""
        number = super().convert(value, param, ctx)
        if number > self._guard:
            self.fail(
                f"{number:g} is more than {self._guard:g}, the most there can be.", param, ctx
            )
        return number


class Threads(click.IntRange):
    """A number of threads, as many as some per core: with many more a call takes minutes."""

    def __init__(self) -> None:
        super().__init__(1, _THREADS_PER_CORE * (os.cpu_count() or 1))


class BudgetText(click.ParamType):  # type: ignore[type-arg]  # generic in later versions
    """A budget, kept as text: a fraction has a decimal point, a whole number has none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, or fail as click does."""
        text = str(value).strip()
        if not _BUDGET.fullmatch(text):
            self.fail(
                f"{text[:40]!r} is no budget. Give a fraction with a decimal point, such as 0.5, "
                "or a whole number of activations.",
                param,
                ctx,
            )
        return text


def tokens_type(least: int = 1) -> click.IntRange:
    """Return the type of a number of tokens in one call or sequence."""
    return WholeFrom(least, MOST_TOKENS)


seed_type = WholeFrom(0, MOST_SEED)
