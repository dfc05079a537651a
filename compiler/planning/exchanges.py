"""Plans measured as a whole: the best by additive costs first, then exchanges between two layers.

A sensitivity profile measures one layer at a time and adds up; what two layers lose together is
often more or less. So the plans that look best by sums are measured, and the best of those is
improved by moving single experts from one layer to another.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.planning.knapsack import Costs, best_allocations
from alloc_moe.compiler.planning.saved import FORMAT, read_losses
from alloc_moe.compiler.workspace.files import save_text
from alloc_moe.runtime.console import duration

if TYPE_CHECKING:
    from alloc_moe.runtime.console import Console, Progress

Plan = tuple[int, ...]
Evaluate = Callable[[Plan], float]


@dataclass(frozen=True)
class RefineReport:
    """How a search went.

    ``first_loss`` is the measured loss of the plan that was best by sums, ``loss`` that of the plan
    found; never the larger. ``measured`` plans were measured now, ``remembered`` ones by an
    earlier run. ``finished`` is whether no exchange is left that lowers the loss.
    """

    first_loss: float
    loss: float
    starts: int
    exchanges: int
    measured: int
    remembered: int
    finished: bool
    seconds: float

    def to_plan(self) -> dict[str, Any]:
        """Return what the plan says of the search: what doesn't depend on how fast it went."""
        names = ("first_loss", "loss", "starts", "exchanges", "finished")
        return {name: getattr(self, name) for name in names}


def refine(
    costs: Costs,
    budget: int,
    evaluate: Evaluate,
    n: int,
    *,
    seconds: float = math.inf,
    seed: int = 0,
    cache_path: Path | None = None,
    fingerprint: str = "",
    console: Console | None = None,
) -> tuple[list[int], RefineReport]:
    """Return the plan of the lowest loss found, starting from the n best by `costs`.

    The same seed finds the same plan, given the time: cut short, a run ends with the best plan so
    far, and the next goes on from `cache_path` where it ended.

    Args:
        costs: ``costs[l][k - 1]`` is what k experts in layer l cost by themselves.
        budget: The most activations of a plan.
        evaluate: Measures the loss of a whole plan.
        n: How many plans to start with.
        seconds: When to stop. The best plan by `costs` is measured in any case, and a measurement
            that has begun is finished.
        seed: Sets the order in which exchanges are tried.
        cache_path: Where every measurement is kept.
        fingerprint: Of all that `evaluate` depends on; kept measurements of another are left alone.
        console: Where progress is told, and whether time ran out.

    Raises:
        BudgetError: Fewer activations than layers.
        ProfileError: A cost or a loss is no finite number, or the kept file can't be read.
        OutputError: The file can't be written.
    """
    starts = [tuple(plan) for plan in best_allocations(costs, budget, n)]
    return search(
        starts,
        [len(row) for row in costs],
        evaluate,
        seconds=seconds,
        seed=seed,
        cache_path=cache_path,
        fingerprint=fingerprint,
        console=console,
    )


def search(
    starts: Sequence[Plan],
    most: Sequence[int],
    evaluate: Evaluate,
    *,
    allowed: Callable[[Plan], bool] = lambda _: True,
    seconds: float = math.inf,
    seed: int = 0,
    cache_path: Path | None = None,
    fingerprint: str = "",
    console: Console | None = None,
) -> tuple[list[int], RefineReport]:
    """Return the plan of the lowest loss found from given plans on; for the rest see `refine`.

    Args:
        starts: Plans to measure first, at least one.
        most: K of each layer.
        evaluate: Measures the loss of a whole plan.
        allowed: Whether an exchange may lead to a plan: for budgets of other kinds than
            activations, whose sum an exchange leaves as it is.
        seconds: As for `refine`, and so are the others.
        seed: Sets the order in which exchanges are tried.
        cache_path: Where every measurement is kept.
        fingerprint: Of all that `evaluate` depends on.
        console: Where progress is told.
    """
    memory = _Memory(cache_path, fingerprint)
    if console is None:
        return _search(starts, most, evaluate, allowed, seconds, seed, memory, None)
    with console.progress("Refining", None, unit="plans") as progress:
        plan, report = _search(starts, most, evaluate, allowed, seconds, seed, memory, progress)
    gain = f"measured loss {report.first_loss:.5g} -> {report.loss:.5g}"
    if report.finished:
        console.note(f"No exchange between two layers improves the plan any more; {gain}")
    else:
        again = "; the same command goes on from here" if cache_path else ""
        console.warn(f"Refining was cut short after {duration(report.seconds)}: {gain}{again}.")
    return plan, report


def _search(
    starts: Sequence[Plan],
    most: Sequence[int],
    evaluate: Evaluate,
    allowed: Callable[[Plan], bool],
    seconds: float,
    seed: int,
    memory: _Memory,
    progress: Progress | None,
) -> tuple[list[int], RefineReport]:
    begin = time.monotonic()

    def loss_of(plan: Plan) -> float:
        known = memory.recall(plan)
        if known is not None:
            return known
        if plan != starts[0] and time.monotonic() - begin >= seconds:
            raise _OutOfTimeError
        loss = memory.keep(plan, evaluate(plan))
        if progress is not None:
            progress.advance()
        return loss

    first_loss = loss = loss_of(starts[0])
    best, exchanges, finished = starts[0], 0, True
    try:
        for plan in starts[1:]:
            if (found := loss_of(plan)) < loss:
                best, loss = plan, found
        random = np.random.default_rng(seed)
        while better := _first_better(loss_of, _exchanges(best, most, random), loss, allowed):
            best, loss = better
            exchanges += 1
    except _OutOfTimeError:
        finished = False
    return list(best), RefineReport(
        first_loss=first_loss,
        loss=loss,
        starts=len(starts),
        exchanges=exchanges,
        measured=memory.measured,
        remembered=len(memory.recalled),
        finished=finished,
        seconds=time.monotonic() - begin,
    )


def _first_better(
    loss_of: Evaluate, plans: Iterable[Plan], loss: float, allowed: Callable[[Plan], bool]
) -> tuple[Plan, float] | None:
    for plan in plans:
        if allowed(plan) and (found := loss_of(plan)) < loss:
            return plan, found
    return None


def _exchanges(plan: Plan, most: Sequence[int], random: np.random.Generator) -> Iterator[Plan]:
    """Yield the plans with one expert less in a layer and one more in another, in random order."""
    for pair in random.permutation(len(plan) ** 2):
        giver, taker = divmod(int(pair), len(plan))
        if giver != taker and plan[giver] > 1 and plan[taker] < most[taker]:
            changed = list(plan)
            changed[giver] -= 1
            changed[taker] += 1
            yield tuple(changed)


class _OutOfTimeError(Exception):
    """No measurement may begin any more."""


class _Memory:
    """Measured losses by plan, in a file that holds those of other fingerprints, too."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.measured = 0
        self.recalled: set[Plan] = set()
        self._path = path
        self._all = read_losses(path)
        self._losses = self._all.setdefault(fingerprint, {})
        self._before = frozenset(self._losses)

    def recall(self, plan: Plan) -> float | None:
        """Return the loss of a plan that was measured."""
        name = _name(plan)
        if name in self._before:
            self.recalled.add(plan)
        return self._losses.get(name)

    def keep(self, plan: Plan, loss: float) -> float:
        """Save and return the loss of a plan."""
        if not math.isfinite(loss):
            raise ProfileError(
                f"The plan {_name(plan)} has a loss of {loss} on the calibration text, which can't "
                "be compared. Check the model's weights."
            )
        self.measured += 1
        self._losses[_name(plan)] = float(loss)
        if self._path is not None:
            found = read_losses(self._path)  # another compile may have added some meanwhile
            for fingerprint, losses in self._all.items():
                found.setdefault(fingerprint, {}).update(losses)
            text = json.dumps({"format": FORMAT, "losses": found}, indent=1)
            save_text(text + "\n", self._path, what="Measured losses")
        return float(loss)


def _name(plan: Plan) -> str:
    return " ".join(map(str, plan))
