"""A budget that holds on any text: the price of one sequence, steered by the experts that ran.

A price meets its budget in the mean over text like the calibration text. On other text more or
fewer experts run at it. So after every call the price is set anew, by what the plan's dial says and
by how far this text has been from it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alloc_moe.runtime.artifact.dial import DialCurve, activations_of
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.calls import Output, Session, check_prices
from alloc_moe.runtime.execution.rows import gather_rows

WINDOW = 256
"""Tokens over which a budget holds: enough that single tokens, whose experts differ by a fifth,
average out to less than 2 %, and few enough that an answer in a chat is held."""
CHUNK = 24
"""Tokens of a prompt per call, but for the first two calls, which share as many. What they run too
much must be made up for within a window; with fewer tokens the experts' products get slow."""
_REPAY = 16  # tokens over which what ran too much is made up for
_DAMPED = 2.0  # times the tokens of a call: over so many at least, or the price would swing
_TOLERATED = 1.5  # tokens' budgets that a piece of a prompt may leave to be made up for
_CAUTION = 0.75  # how far a piece follows the dial the second time, in logarithms of the price
_MEMORY = 64  # tokens over which a text's distance from the dial is averaged
_TRUST = 32  # tokens that the calibration text counts for before the first
_MOST_TURN = 1.5  # times or a part of the budget: as far as the dial is followed
_MOST_DEBT = 0.1  # of what a window runs; more is forgotten, where a budget can't be met
_LEAST_PRICE = 1e-3  # of the dial's first; where a price is zero it has no logarithm


class Hold:
    """The price of an activation for one sequence, such that a mean of activations holds.

    What ran beyond the budget since the beginning is a debt, which the tokens to come pay back. As
    it stays small, the mean over any window stays near the budget. Where the text runs more or
    fewer experts than the dial says at a price, the dial is moved: by the quotient of the prices at
    which it has what it said, and what ran.

    Args:
        curve: The dial.
        budget: Activations per token to hold, from ``curve.least`` to ``curve.original``.
    """

    def __init__(self, curve: DialCurve, budget: float) -> None:
        self.budget = budget
        self.price = curve.price(budget)
        self.tokens = 0
        self.executed = 0
        self._curve = curve
        self._debt = 0.0
        self._weight = float(_TRUST)  # of the two sums below, in tokens
        self._ran = self._said = _TRUST * budget
        self._lowest = _LEAST_PRICE * min((p.price for p in curve.points if p.price), default=0.0)

    @property
    def mean(self) -> float:
        """Activations per token so far, NaN before the first token."""
        return self.executed / self.tokens if self.tokens else math.nan

    def observe(self, tokens: int, executed: int) -> None:
        """Set the price of the next call.

        Args:
            tokens: Those that were computed at `price`, no padding among them.
            executed: The experts that ran for them in all layers.
        """
        self.tokens += tokens
        self.executed += executed
        if not (tokens and self._steers):
            return
        kept = math.exp(-tokens / _MEMORY)
        self._weight = self._weight * kept + tokens
        self._ran = self._ran * kept + executed
        self._said = self._said * kept + tokens * self._curve.activations(self.price)
        most = _MOST_DEBT * WINDOW * self.budget
        self._debt = min(max(self._debt + executed - tokens * self.budget, -most), most)
        moved = self._priced(self._said / self._weight) / self._priced(self._ran / self._weight)
        repaid = self._debt / max(_REPAY, _DAMPED * tokens)
        self.price = self._priced(self.budget - repaid) * moved

    def corrected(self, tokens: int, executed: int) -> float | None:
        """Return the price to compute a call again at; None if it ran about what it should.

        One token isn't computed again: the next ones make up for it. What a piece of a prompt ran
        at one price says what it will run at another, so the second time it is near the budget.

        Args:
            tokens: Those that were computed at `price`, no padding among them.
            executed: The experts that ran for them in all layers.
        """
        debt = self._debt + executed - tokens * self.budget
        if tokens < 2 or abs(debt) <= _TOLERATED * self.budget or not self._steers:
            return None
        wanted = self._priced(self.budget - self._debt / tokens)
        price = self.price * (wanted / self._priced(executed / tokens)) ** _CAUTION
        return price if price != self.price else None

    def between(
        self, tokens: int, first: tuple[float, int], second: tuple[float, int]
    ) -> float | None:
        """Return the price of a third time, between the two; None where the second came nearer.

        Args:
            tokens: Those that were computed.
            first: A price, and the experts that ran at it.
            second: The same, of the second time.
        """
        wanted = tokens * self.budget - self._debt
        (price, ran), (other, again) = first, second
        if abs(again - wanted) <= abs(ran - wanted) or again == ran:
            return None
        part = min(max((wanted - ran) / (again - ran), 0.0), 1.0)
        return float(price * (other / price) ** part)

    @property
    def _steers(self) -> bool:
        """Whether there is a price to set."""
        return bool(self._lowest) and self.budget < self._curve.original

    def _priced(self, activations: float) -> float:
        """The dial's price near the budget, above zero."""
        least = max(self._curve.least, self.budget / _MOST_TURN)
        most = min(self._curve.original, self.budget * _MOST_TURN)
        return max(self._curve.price(min(max(activations, least), most)), self._lowest)


@dataclass(frozen=True)
class HeldBudget:
    """Activations per token that each sequence is to hold by itself."""

    curve: DialCurve
    activations: float

    def begin(self) -> Hold:
        """Return what holds it for a new sequence."""
        return Hold(self.curve, self.activations)


def held_budget(session: Session, budget: str | float | None = None) -> HeldBudget:
    """Return a budget to hold; None is the one compiled in. See `price_of` for the others.

    Raises:
        GenerationError: The artifact has no dial, the budget isn't on it, or the session doesn't
            tell which experts ran for a token.
    """
    graph = session.files.graph
    if not (session.has_dial and session.plan.dial):
        raise GenerationError(
            f"{graph} has its budget compiled in, so it can't be held. Compile it with "
            "--redistribute price and no cap, or don't hold the budget."
        )
    if session.pads_right:
        raise GenerationError(
            f"{graph} was compiled with --device cuda, and such artifacts don't count experts "
            "token by token, wherever they run, so its budget can't be held. Compile it with "
            "--device cpu, or don't hold the budget."
        )
    if session.device != "cpu":
        raise GenerationError(
            f"{graph} runs on a GPU, where experts aren't counted token by token, so its budget "
            "can't be held. Run it with --ep cpu, or don't hold the budget."
        )
    if not session.counts_activations:
        raise GenerationError(
            f"{graph} was opened without counting experts, so its budget can't be held. "
            "Open it with count_activations=True."
        )
    curve = DialCurve.of(session.plan)
    if budget is None:
        planned = session.plan.budget.activations
        return HeldBudget(curve, min(max(planned, curve.least), curve.original))
    return HeldBudget(curve, activations_of(curve, budget))


def parts(tokens: int) -> list[slice]:
    """Return the pieces of a prompt that are computed one after the other, see `CHUNK`."""
    starts = [0, CHUNK // 2, *range(CHUNK, tokens, CHUNK)]
    starts = [start for start in starts if start < tokens]
    return [slice(*ends) for ends in itertools.pairwise([*starts, tokens])]


def run_held(
    session: Session,
    hold: Hold,
    ids: ArrayLike,
    *,
    cache: Cache,
    logits_to_keep: int | None = None,
) -> Output:
    """Run a call of one sequence, ids [1, tokens], at its hold's price, which is then set anew.

    A piece of a prompt that ran far too much or too little is computed again at once, where the
    cache can go back: states of a fixed size can't.
    """
    before = cache.length

    def run(price: float) -> tuple[Output, int, int]:
        hold.price = price
        output = session.run(ids, cache=cache, price=price, logits_to_keep=logits_to_keep)
        executed = executed_by_token(output)
        return output, len(executed), int(executed.sum())

    first = hold.price
    output, tokens, executed = run(first)
    second = None if cache.states else hold.corrected(tokens, executed)
    if second is not None:
        cache.truncate(before)
        output, tokens, again = run(second)
        third = hold.between(tokens, (first, executed), (second, again))
        executed = again
        if third is not None:
            cache.truncate(before)
            output, tokens, executed = run(third)
    hold.observe(tokens, executed)
    return output


def prefill(
    session: Session,
    ids: Sequence[int],
    hold: Hold,
    *,
    capacity: int,
    on_output: Callable[[Output], None] | None = None,
) -> Output:
    """Compute a prompt piece by piece, each at its price, and return what the last one gave.

    Args:
        session: One that `held_budget` accepts.
        ids: The prompt's tokens, one or more.
        hold: Its sequence's.
        capacity: Columns to have room for in the cache.
        on_output: Called with what every call gave.
    """
    cache = session.empty_cache(1, capacity=capacity)
    for part in parts(len(ids)):
        output = run_held(session, hold, [ids[part]], cache=cache, logits_to_keep=1)
        if on_output is not None:
            on_output(output)
    return output


def prefill_apart(
    session: Session,
    prompts: Sequence[Sequence[int]],
    holds: Sequence[Hold],
    *,
    capacity: int,
    on_output: Callable[[Output], None] | None = None,
) -> tuple[NDArray[np.floating], Cache]:
    """Compute prompts one by one, so that none depends on another, and put them into one batch.

    Returns:
        The logits of each prompt's last token [batch, 1, vocabulary], and a cache in which all end
        at the same column.

    Raises:
        GenerationError: Sequences of one call can't have prices of their own.
    """
    check_prices(session, len(prompts))
    alone = len(prompts) == 1
    outputs = [
        prefill(session, ids, hold, capacity=capacity if alone else len(ids), on_output=on_output)
        for ids, hold in zip(prompts, holds, strict=True)
    ]
    if alone:
        return outputs[0].logits, outputs[0].cache
    cache = gather_rows(session, [(output.cache, 0) for output in outputs], capacity=capacity)
    return np.concatenate([output.logits for output in outputs]), cache


def executed_by_token(output: Output) -> NDArray[np.int64]:
    """Return the experts that ran in all layers for each token of a call [batch * sequence].

    Padding among them has counts that mean nothing.
    """
    assert output.rows is not None
    total: NDArray[np.int64] = np.sum(output.rows, axis=0)
    return total
