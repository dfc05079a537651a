"""The chart of loss against bytes, for the page and for a picture of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from alloc_moe.compiler.sweep.report.axes import Frame
from alloc_moe.compiler.sweep.report.frontier.points import Frontier, Point, size
from alloc_moe.compiler.sweep.report.svg import (
    COLORS,
    SHAPES,
    Style,
    group,
    line,
    linear,
    marker,
    path,
    rect,
    symmetric_log,
    text,
)
from alloc_moe.compiler.sweep.ways import WAYS

_COLORS = (0, 6, 2, 1, 4, 7, 3, 5)  # of the ways in their order: neighbours far apart
_STEPS = (1, 2, 2.5, 5, 10)
_MOST_TICKS = 8


def way_styles(frontier: Frontier) -> dict[str, Style]:
    """Return how each way looks: the same in every report."""
    known = [way.name for way in WAYS.values()]
    names = [*known, *(method for method in frontier.methods if method not in known)]
    places = {name: place for place, name in enumerate(names)}
    return {
        method: Style(
            f"m{(*_COLORS, 8, 9)[places[method] % COLORS]} w{places[method]}",
            SHAPES[places[method] % len(SHAPES)],
            "",
        )
        for method in frontier.methods
    }


def frontier_frame(frontier: Frontier, area: tuple[float, float, float, float]) -> Frame:
    """Return the frame that holds every point; `area` is its left, right, top and bottom."""
    left, right, top, bottom = area
    read = [point.read.mean for point in frontier.points] or [0.0]
    air = (max(read) - min(read)) * 0.04 or 1.0
    x = linear(min(read) - air, max(read) + air, left, right)
    added = [v for point in frontier.points for v in (point.added.low, point.added.high)]
    return Frame(left, right, top, bottom, x, symmetric_log(added))


def frontier_axes(frontier: Frontier, frame: Frame, *captions: str) -> str:
    """Return grid lines and their labels: losses, and bytes."""
    drawn, last = [], frame.bottom + 100
    for tick in frame.scale.ticks():
        y = frame.y(tick)
        drawn.append(line(frame.left, y, frame.right, y, css="grid" if tick else "zero"))
        if last - y >= 13:  # upwards: y falls
            label = frame.scale.label(tick)
            drawn.append(text(frame.left - 7, y + 4, label, css="tick", anchor="end"))
            last = y
    for nbytes in _ticks(frontier, frame):
        x = frame.x(nbytes)
        drawn.append(line(x, frame.top, x, frame.bottom, css="grid"))
        drawn.append(text(x, frame.bottom + 17, size(nbytes), css="tick", anchor="middle"))
    return group("axes", *drawn, *captions)


def frontier_marks(frontier: Frontier, frame: Frame, styles: Mapping[str, Style]) -> list[str]:
    """Return the ways' points, those that none beats joined and over the others."""
    drawn = []
    for method in frontier.methods:
        row = frontier.row(method)
        beaten = [_mark(frame, point, styles[method]) for point in row if not point.best]
        thread = path([_place(frame, point) for point in row], css="thread")
        drawn.append(group(f"series {styles[method].css} faint", thread, *beaten))
    drawn.append(path([_place(frame, point) for point in frontier.best], css="frontier"))
    for point in frontier.best:
        style = styles[point.method]
        drawn.append(group(f"series {style.css}", _mark(frame, point, style)))
    return drawn


def describe(point: Point) -> str:
    """Return a point with all its digits, for a tooltip."""
    seeds, added = len(point.cells), point.added
    spread = f" ({added.low:+.5f} to {added.high:+.5f} over {seeds} seeds)" if seeds > 1 else ""
    bits = "/".join(map(str, point.cells[0].bits_per_layer))
    lines = [
        f"{point.method}, {point.k if point.plain else f'at most {point.target:.0f} bytes'}",
        f"added loss {added.mean:+.5f} nats per token{spread}",
        f"{point.read.mean:.0f} bytes read, {point.activations.mean:.2f} experts",
        f"bits of experts, layer by layer: {bits}",
    ]
    if point.divergence:
        lines.append(f"divergence {point.divergence.mean:.5f} nats per token")
    return "\n".join(lines)


def _ticks(frontier: Frontier, frame: Frame) -> list[float]:
    """Return round numbers of bytes in the frame's range, no more than have room."""
    read = [point.read.mean for point in frontier.points]
    low, high = min(read, default=0.0), max(read, default=0.0)
    if low == high:
        return [low] if read else []
    room = min(_MOST_TICKS, (frame.right - frame.left) / 64)
    least = (high - low) / room
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in _STEPS if m * power >= least)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _place(frame: Frame, point: Point) -> tuple[float, float]:
    return frame.x(point.read.mean), frame.y(point.added.mean)


def _mark(frame: Frame, point: Point, style: Style) -> str:
    x, y = _place(frame, point)
    whisker = line(x, frame.y(point.added.high), x, frame.y(point.added.low), css="whisker")
    # A generous invisible target, as a marker is hard to hit with a finger.
    target = rect(x - 9, y - 9, 18, 18, css="target")
    mark = marker(style.shape, x, y, 5.2 if point.best else 4.0)
    return group("tip", whisker, mark, target, title=describe(point))
