"""The area of a chart of added loss against activations: where values lie in it, and its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alloc_moe.compiler.sweep.report.data import Digest, Summary, percent
from alloc_moe.compiler.sweep.report.svg import (
    Linear,
    SymmetricLog,
    group,
    line,
    linear,
    path,
    text,
    text_width,
)


@dataclass(frozen=True)
class Frame:
    """The plot's area inside a drawing; the full model on the left, fewer experts to the right."""

    left: float
    right: float
    top: float
    bottom: float
    x: Callable[[float], float]
    scale: SymmetricLog | Linear

    def y(self, added: float) -> float:
        """Return where an added loss lies, growing upwards."""
        return self.bottom - self.scale.place(added) * (self.bottom - self.top)


def make_frame(
    digest: Digest,
    area: tuple[float, float, float, float],
    scale: Callable[[Sequence[float]], SymmetricLog | Linear],
) -> Frame:
    """Return the frame that holds every result; `area` is its left, right, top and bottom."""
    left, right, top, bottom = area
    found = digest.summaries.values()
    values = [v for s in found for v in (s.added.low, s.added.mean, s.added.high)]
    full = digest.results.full_activations
    # Budgets asked for are in the range too, as their grid lines are drawn.
    used = [s.activations.mean for s in found] + [b * full for b in digest.budgets]
    most, least = max([full, *used]), min([full, *used])
    air = (most - least) * 0.03 or 1.0
    x = linear(most + air, least - air, left, right)
    return Frame(left, right, top, bottom, x, scale(values))


def axes(frame: Frame, digest: Digest, *captions: str, counts: bool) -> str:
    """Return grid lines and their labels: losses, and the budgets asked for.

    With `counts` budgets have, under their share of the full model, their number of experts.
    """
    drawn, last = [], frame.bottom + 100
    for tick in frame.scale.ticks():
        y = frame.y(tick)
        drawn.append(line(frame.left, y, frame.right, y, css="grid" if tick else "zero"))
        if last - y >= 13:  # upwards: y falls
            drawn.append(
                text(frame.left - 7, y + 4, frame.scale.label(tick), css="tick", anchor="end")
            )
            last = y
    full = digest.results.full_activations
    used = 0.0
    for budget in sorted({1.0, *digest.budgets}, reverse=True):
        x = frame.x(budget * full)
        if budget != 1.0:
            drawn.append(line(x, frame.top, x, frame.bottom, css="grid"))
        label = percent(budget) if budget != 1.0 else "full"
        half = text_width(label, 12) / 2
        if x - half >= used + 5:
            drawn.append(text(x, frame.bottom + 17, label, css="tick", anchor="middle"))
            if counts:
                count = f"{budget * full:.1f}".removesuffix(".0")
                drawn.append(text(x, frame.bottom + 32, count, css="tick faint", anchor="middle"))
            used = x + half
    return group("axes", *drawn, *captions)


def route(frame: Frame, digest: Digest, method: str) -> list[tuple[float, float]]:
    """Return a method's points, from the full model to the smallest budget."""
    row = sorted(digest.row(method), key=lambda s: -s.activations.mean)
    start = (frame.x(digest.results.full_activations), frame.y(0.0))
    return [start, *((frame.x(s.activations.mean), frame.y(s.added.mean)) for s in row)]


def band(frame: Frame, row: Sequence[Summary]) -> str:
    """Return the area between lowest and highest seed."""
    if len(row) < 2:
        return ""
    above = [(frame.x(s.activations.mean), frame.y(s.added.high)) for s in row]
    below = [(frame.x(s.activations.mean), frame.y(s.added.low)) for s in reversed(row)]
    return path([*above, *below], css="band")
