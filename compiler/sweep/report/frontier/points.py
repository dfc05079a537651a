"""What ways give for the bytes that a token reads, over seeds, and which points none beats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.data import (
    OVERSPENT,
    Estimate,
    estimate,
    is_baseline,
    loss,
)
from alloc_moe.compiler.sweep.ways import WAYS

AS_LITTLE = 1.01
"""Times the bytes of a point: as little as it reads. Held-out text differs by as much."""
_ALIKE = 1e-5  # nats: what the same experts, run in another order, lose more or less
_ORDER = {way.name: place for place, way in enumerate(WAYS.values())}


@dataclass(frozen=True)
class Point:
    """One way at one target, over its seeds with a finite loss.

    ``read`` are the bytes that tokens of the scored text read. With ``plain`` it is one k for all
    layers, whose bytes are the target. ``best`` says that no point that reads as little, or 1 %
    more, loses less.
    """

    method: str
    target: float
    cells: tuple[Cell, ...]
    added: Estimate
    read: Estimate
    activations: Estimate
    divergence: Estimate | None
    plain: bool
    best: bool = False

    @property
    def overspent(self) -> bool:
        """Whether more was read than asked for, beyond what any held-out text may take."""
        return self.read.mean > OVERSPENT * self.target

    @property
    def k(self) -> str:
        """Return the experts of each layer if all have as many, else their sum."""
        if self.plain:
            return f"k = {max(self.cells[0].planned_per_layer):g}"
        return f"{self.activations.mean:.1f} experts"


Quantity = Callable[[Point], Estimate | None]
"""What of points is compared: their added loss, their divergence."""


class Frontier:
    """All points of a sweep, ways in their own order, each from few bytes to many."""

    def __init__(self, results: SweepResults) -> None:
        self.results = results = results.of_targets
        self.points = _marked(_points(results.cells))
        known = dict.fromkeys(point.method for point in self.points)
        self.methods = tuple(sorted(known, key=lambda name: (_ORDER.get(name, len(_ORDER)), name)))
        asked = {point.target for point in self.points if not point.plain}
        self.targets = tuple(sorted(asked or {point.target for point in self.points}))

    def row(self, method: str) -> list[Point]:
        """Return the points of a way, from few bytes to many."""
        found = (point for point in self.points if point.method == method)
        return sorted(found, key=lambda point: (point.read.mean, point.target))

    def get(self, method: str, target: float) -> Point | None:
        """Return what a way gives for a target; of a plain one the largest k within it."""
        row = self.row(method)
        if any(point.plain for point in row):
            row = [point for point in row if point.target <= target][-1:]
            return row[0] if row else None
        return next((point for point in row if point.target == target), None)

    def least(
        self, target: float, of: Quantity = lambda point: point.added, *, plain: bool | None = None
    ) -> Point | None:
        """Return the least for a target among ways that kept to it, or among plain ones.

        Of what is alike the one that reads least is taken.
        """

        def rank(point: Point) -> tuple[float, float]:
            found = of(point)
            return (math.inf if found is None else round(found.mean / _ALIKE), point.read.mean)

        found = (self.get(method, target) for method in self.methods)
        kept = [
            point
            for point in found
            if point and not point.overspent and plain in (None, point.plain)
        ]
        return min(kept, key=rank, default=None)

    @property
    def best(self) -> list[Point]:
        """The points that no other beats, from few bytes to many."""
        return sorted((point for point in self.points if point.best), key=lambda p: p.read.mean)


def headline(frontier: Frontier) -> str:
    """Return the main finding in one sentence, for the target in the middle."""
    if not frontier.targets:
        return "The sweep holds no finite result"
    target = frontier.targets[len(frontier.targets) // 2]
    best, plain = frontier.least(target), frontier.least(target, plain=True)
    if not best:
        return f"No way reads as little as {size(target)} a token"
    finding = f"Within {size(target)} a token, {best.method} loses {loss(best.added.mean)} nats"
    if not plain or plain is best:
        return finding
    return f"{finding}; the best plain pair of k and bits loses {loss(plain.added.mean)}"


def size(nbytes: float) -> str:
    """Return a number of bytes with three digits: ``0.791 MB``, ``1.2 GB``."""
    unit, name = next(
        ((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if nbytes >= 0.1 * u),
        (1.0, "B"),
    )
    digits = 3 if nbytes >= unit else 2  # 0.79 MB is as exact as 1.21 MB
    return f"{float(f'{nbytes / unit:.{digits}g}'):g} {name}"


def unbeaten(points: Sequence[Point]) -> str:
    """Return how many of a way's points none beats, in words."""
    count = sum(point.best for point in points)
    return f"{count or 'none'} of {len(points)} unbeaten"


def _points(cells: Iterable[Cell]) -> list[Point]:
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        assert cell.target_bytes is not None
        finite = math.isfinite(cell.added_loss) and cell.read_bytes is not None
        if finite:
            groups.setdefault((cell.method, cell.target_bytes), []).append(cell)
    return [_point(method, target, found) for (method, target), found in groups.items()]


def _point(method: str, target: float, cells: Sequence[Cell]) -> Point:
    divergences = [cell.divergence for cell in cells if cell.divergence is not None]
    return Point(
        method,
        target,
        tuple(sorted(cells, key=lambda cell: cell.seed)),
        estimate(cell.added_loss for cell in cells),
        estimate(cell.read_bytes for cell in cells if cell.read_bytes is not None),
        estimate(cell.activations for cell in cells),
        estimate(divergences) if divergences else None,
        plain=is_baseline(cells[0]),
    )


def _marked(points: Sequence[Point]) -> list[Point]:
    """Return the points, those that none beats marked."""
    return [
        dataclasses.replace(point, best=not any(_beats(other, point) for other in points))
        for point in points
    ]


def _beats(point: Point, other: Point) -> bool:
    """Whether a point reads as little and loses less, or reads less and loses no more.

    Several ways may give the same artifact, whose losses differ by rounding: none beats the others.
    """
    if point.added.mean < other.added.mean - _ALIKE:
        return point.read.mean <= AS_LITTLE * other.read.mean
    return point.added.mean <= other.added.mean and point.read.mean < other.read.mean
