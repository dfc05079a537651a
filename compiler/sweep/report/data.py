"""What a report says, computed from a sweep's cells: means over seeds, ranks, the headline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.svg import MINUS

# A method calibrated on one text and measured on another misses its budget a little. More than
# this above it, a result isn't compared with those that kept the budget.
OVERSPENT = 1.02

_FRACTIONS = {
    0.25: "a quarter of the experts",
    0.5: "half the experts",
    0.75: "three quarters of the experts",
    1.0: "all experts",
}


@dataclass(frozen=True)
class Estimate:
    """A quantity over calibration seeds."""

    mean: float
    low: float
    high: float

    @property
    def half_spread(self) -> float:
        """Half the distance between the lowest and the highest seed."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Summary:
    """One method at one budget, over its calibration seeds with a finite loss.

    ``failed`` seeds had none: their result is compared with nobody's.
    """

    method: str
    budget: float
    cells: tuple[Cell, ...]
    added: Estimate
    activations: Estimate
    decode: Estimate | None
    overspent: bool
    failed: int

    @property
    def remark(self) -> str:
        """Say how many seeds are missing from the mean, if any."""
        seeds = len(self.cells) + self.failed
        return f"{self.failed} of {seeds} seeds not finite" if self.failed else ""


class Digest:
    """The budgets of a sweep, summarised: methods from best to worst at the reference budget.

    ``reference`` is the budget nearest to half. ``default`` is the tool's default method, if the
    sweep has it; ``baseline`` is plain top-k with the same k in every layer, if it has that.
    """

    def __init__(self, results: SweepResults) -> None:
        self.results = results = results.of_budgets
        self.summaries = _summaries(results)
        cells = results.cells
        self.budgets = tuple(sorted({cell.budget for cell in cells}))
        self.default = next((cell.method for cell in cells if cell.default), None)
        self.baseline = next((cell.method for cell in cells if is_baseline(cell)), None)
        own = [b for b in self.budgets if (self.default, b) in self.summaries]
        self.reference = min(own or self.budgets, key=lambda b: (abs(b - 0.5), b), default=0.5)
        self.methods = tuple(sorted({cell.method for cell in cells}, key=self._rank))

    def _rank(self, method: str) -> tuple[float, str]:
        summary = self.get(method, self.reference)
        return (summary.added.mean if summary else math.inf, method)

    def get(self, method: str | None, budget: float) -> Summary | None:
        """Return a method's summary at a budget, or None where the sweep has none."""
        return self.summaries.get((method, budget))

    def row(self, method: str) -> list[Summary]:
        """Return a method's summaries from the smallest budget to the largest."""
        found = (self.get(method, budget) for budget in self.budgets)
        return [summary for summary in found if summary]

    def best(self, budget: float) -> Summary | None:
        """Return the lowest added loss at a budget among the methods that kept to it."""
        found = (self.get(method, budget) for method in self.methods)
        kept = [
            summary for summary in found if summary and not (summary.overspent or summary.failed)
        ]
        return min(kept, key=lambda summary: summary.added.mean, default=None)

    @property
    def subject(self) -> str | None:
        """The method that the report is about: the default, else the best."""
        if self.default:
            return self.default
        best = self.best(self.reference)
        return best.method if best else next(iter(self.methods), None)


def is_baseline(cell: Cell) -> bool:
    """Return whether a cell is plain top-k with the same k in every layer."""
    plain = cell.correction.lower() in ("", "none")
    return cell.allocation == "uniform" and cell.redistribution == "none" and plain


def _summaries(results: SweepResults) -> dict[tuple[str | None, float], Summary]:
    groups: dict[tuple[str | None, float], list[Cell]] = {}
    for cell in results.cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    summaries = {}
    for key, cells in groups.items():
        finite = [c for c in cells if math.isfinite(c.added_loss) and math.isfinite(c.activations)]
        if finite:
            summaries[key] = _summary(finite, results, failed=len(cells) - len(finite))
    return summaries


def _summary(cells: Sequence[Cell], results: SweepResults, *, failed: int) -> Summary:
    decode = [
        cell.loss_decode - results.full_loss
        for cell in cells
        if cell.loss_decode is not None and math.isfinite(cell.loss_decode)
    ]
    activations = estimate(cell.activations for cell in cells)
    budget = cells[0].budget
    return Summary(
        method=cells[0].method,
        budget=budget,
        cells=tuple(sorted(cells, key=lambda cell: cell.seed)),
        added=estimate(cell.added_loss for cell in cells),
        activations=activations,
        decode=estimate(decode) if decode else None,
        overspent=activations.mean > OVERSPENT * budget * results.full_activations,
        failed=failed,
    )


def estimate(values: Iterable[float]) -> Estimate:
    """Return mean, lowest and highest of at least one value."""
    known = list(values)
    return Estimate(math.fsum(known) / len(known), min(known), max(known))


def mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over rows of equal length, column by column."""
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def bare(method: str) -> str:
    """Return a method's label without the remark that it is the default."""
    return method.removesuffix(" (default)")


def share(budget: float) -> str:
    """Return a budget in words: ``half the experts``, ``37.5 % of the experts``."""
    return _FRACTIONS.get(budget, f"{percent(budget)} of the experts")


def percent(value: float) -> str:
    """Return a fraction in per cent, with as few digits as it needs, at most one."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def loss(value: float) -> str:
    """Return a loss with four decimals."""
    return f"{value + 0.0:.4f}".replace("-0.0000", "0.0000").replace("-", MINUS)


def figure(value: float, form: str) -> str:
    """Return a number in a format such as ``.5f``, in words if it isn't finite."""
    return format(value, form) if math.isfinite(value) else "not finite"


def signed(value: float, *, minus: str = MINUS) -> str:
    """Return an added loss with its sign and four decimals."""
    return figure(value, "+.4f").replace("-0.0000", "+0.0000").replace("-", minus)


def headline(digest: Digest) -> str:
    """Return the main finding in one sentence."""
    subject = digest.get(digest.subject, digest.reference)
    if not subject:
        return "The sweep holds no finite result"
    place, name = share(digest.reference), bare(subject.method)
    added = subject.added
    if added.mean < 0:
        finding = f"At {place}, {name} is {loss(-added.mean)} nats better than the full model"
    else:
        finding = f"At {place}, {name} loses {loss(added.mean)} nats"
    plain = digest.get(digest.baseline, digest.reference)
    if not plain or plain.method == subject.method:
        return finding
    verb = "loses" if plain.added.mean >= 0 else "gains"
    return f"{finding}; {bare(plain.method)} {verb} {loss(abs(plain.added.mean))}: " + _verdict(
        subject, plain
    )


def _verdict(subject: Summary, plain: Summary) -> str:
    gain = plain.added.mean - subject.added.mean
    if abs(gain) <= subject.added.half_spread + plain.added.half_spread:
        return "no more than the seeds differ"
    if gain < 0:
        return f"{loss(-gain)} nats more"
    if plain.added.mean <= 0:
        return f"{loss(gain)} nats gained"
    recovered = gain / plain.added.mean
    if recovered > 1:
        return "more than all of the loss recovered"
    return f"{recovered:.0%} of the loss recovered".replace("%", " %")
