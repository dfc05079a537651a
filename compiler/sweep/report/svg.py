"""Pieces of SVG as text: elements, markers, scales. Nothing here knows what is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Signs that look right in numbers; named, as they are hard to tell from a hyphen.
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
# Outlines in a box of +-1 around the centre; shape, not only colour, tells methods apart.
_POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    "up": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    "down": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
    "bar": ((-1.25, -0.5), (1.25, -0.5), (1.25, 0.5), (-1.25, 0.5)),
    "post": ((-0.5, -1.25), (0.5, -1.25), (0.5, 1.25), (-0.5, 1.25)),
    "plus": (
        *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
        *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ),
}
SHAPES = ("circle", *_POINTS)
DASHES = ("7 3", "", "9 3 2 3", "4 2")
COLORS = 10


@dataclass(frozen=True)
class Style:
    """How one method looks everywhere: CSS classes (its colour, its own), marker, dashes."""

    css: str
    shape: str
    dash: str


def escape(text: object) -> str:
    """Return text that is safe between tags and in quoted attributes."""
    return html.escape(str(text), quote=True)


def element(name: str, attributes: Mapping[str, object], *children: str) -> str:
    """Return one element; attribute values are escaped, children must be already."""
    written = "".join(f' {key}="{_value(value)}"' for key, value in attributes.items())
    if not children:
        return f"<{name}{written}/>"
    return f"<{name}{written}>{''.join(children)}</{name}>"


def svg(width: float, height: float, label: str, *children: str, css: str = "") -> str:
    """Return a drawing that scales down with its container, never up."""
    attributes = {
        "class": css,
        "viewBox": f"0 0 {number(width)} {number(height)}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": label,
    }
    return element("svg", {k: v for k, v in attributes.items() if v != ""}, "".join(children))


def group(css: str, *children: str, title: str = "") -> str:
    """Return a group; its title is what browsers show when pointed at."""
    tip = [element("title", {}, escape(title))] if title else []
    return element("g", {"class": css}, *tip, *(children or ("",)))


def text(x: float, y: float, content: object, *, css: str = "", anchor: str = "start") -> str:
    """Return one line of text; `anchor` is start, middle or end."""
    attributes = {"x": x, "y": y, "text-anchor": anchor, "class": css}
    kept = {k: v for k, v in attributes.items() if v not in ("", "start")}
    return element("text", kept, escape(content))


def line(x1: float, y1: float, x2: float, y2: float, *, css: str) -> str:
    """Return a straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})


def rect(x: float, y: float, width: float, height: float, *, css: str) -> str:
    """Return a rectangle."""
    attributes = {"x": x, "y": y, "width": max(width, 0), "height": max(height, 0), "class": css}
    return element("rect", attributes)


def path(points: Sequence[tuple[float, float]], *, css: str, dash: str = "") -> str:
    """Return straight lines through points."""
    route = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return element(
        "path", {"d": route, "class": css} | ({"stroke-dasharray": dash} if dash else {})
    )


def marker(shape: str, x: float, y: float, size: float, *, css: str = "mark") -> str:
    """Return a marker of about the same area whatever its shape."""
    if shape == "circle":
        return element("circle", {"cx": x, "cy": y, "r": size, "class": css})
    corners = " ".join(
        f"{number(x + dx * size)},{number(y + dy * size)}" for dx, dy in _POINTS[shape]
    )
    return element("polygon", {"points": corners, "class": css})


def key(style: Style, *, width: float = 34) -> str:
    """Return a method's line and marker, for a legend; the name stands beside it."""
    return element(
        "svg",
        {
            "class": f"key {style.css}",
            "viewBox": f"0 0 {number(width)} 16",
            "width": width,
            "height": 16,
            "aria-hidden": "true",
        },
        path([(1, 8), (width - 1, 8)], css="curve", dash=style.dash),
        marker(style.shape, width / 2, 8, 4.5),
    )


def number(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-0", "0" if abs(value) < 0.005 else "-0")


def text_width(content: str, size: float) -> float:
    """Return about how wide a text is, rather too wide than too narrow."""
    narrow, wide = "iljtfrI.,;:'|!() ", "mwMW%@+"
    widths = (0.38 if c in narrow else 0.95 if c in wide else 0.65 for c in content)
    return size * sum(widths)


def shorten(content: str, letters: int) -> str:
    """Return a text of at most so many letters."""
    return content if len(content) <= letters else content[: letters - 1].rstrip() + "…"


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return positions near those wanted, in their order, at least `gap` apart, inside low..high.

    Where they can't all fit, they are set evenly.
    """
    if len(wanted) > 1 and gap * (len(wanted) - 1) >= high - low:
        step = (high - low) / (len(wanted) - 1)
        ranks = sorted(range(len(wanted)), key=lambda i: wanted[i])
        return [low + step * ranks.index(i) for i in range(len(wanted))]
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    # Blocks of touching labels, each centred on what its members want.
    blocks: list[tuple[list[int], float]] = []
    for index in order:
        members, start = [index], min(max(wanted[index], low), high)
        while blocks and blocks[-1][1] + gap * len(blocks[-1][0]) > start:
            members = blocks.pop()[0] + members
            centre = math.fsum(wanted[i] - gap * n for n, i in enumerate(members)) / len(members)
            start = min(max(centre, low), high - gap * (len(members) - 1))
        blocks.append((members, start))
    for members, start in blocks:
        for place, index in enumerate(members):
            placed[index] = start + gap * place
    return placed


@dataclass(frozen=True)
class SymmetricLog:
    """A scale with zero in it: linear between +-`knee`, logarithmic beyond.

    The linear part on each side takes as much room as half a decade.
    """

    low: float
    high: float
    knee: float

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`."""
        start, end = self._warp(self.low), self._warp(self.high)
        return (self._warp(value) - start) / (end - start)

    def ticks(self) -> list[float]:
        """Return the round values in range: 0 and 1, 2, 5 times powers of ten, or powers alone."""
        span = max(abs(self.low), abs(self.high))
        decades = range(math.floor(math.log10(self.knee)), math.ceil(math.log10(span)) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        sizes = [m * 10.0**d for d in decades for m in steps if m * 10.0**d >= self.knee * 0.999]
        values = [-size for size in reversed(sizes)] + [0.0, *sizes]
        return [value for value in values if self.low <= value <= self.high]

    def label(self, value: float) -> str:
        """Return a tick's sign and digits."""
        return _signed(f"{abs(value):.6f}".rstrip("0").rstrip("."), value)

    def _warp(self, value: float) -> float:
        size = abs(value) / self.knee
        warped = size / 2 if size <= 1 else 0.5 + math.log10(size)
        return math.copysign(warped, value)


def symmetric_log(values: Sequence[float]) -> SymmetricLog:
    """Return the scale that shows these values, zero among them, in at most four decades."""
    sizes = [abs(value) for value in values if value]
    largest = max(sizes, default=1.0)
    # The round number below all sizes, but not more than three decades below the largest.
    least = max(min(sizes, default=1.0), 10.0 ** (_decade(largest) - 3))
    power = 10.0 ** math.floor(math.log10(least))
    knee = max(step * power for step in (1, 2, 5) if step * power <= least * 1.001)
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    # A little air past the outermost values; none below zero if nothing lies there.
    return SymmetricLog(low * 1.25, high * 1.25 or knee, knee)


@dataclass(frozen=True)
class Linear:
    """An even scale from `low` to `high` with a tick at every multiple of `step`."""

    low: float
    high: float
    step: float

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return the multiples of the step in range, zero among them."""
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [self.step * n for n in range(first, last + 1)]

    def label(self, value: float) -> str:
        """Return a tick's sign and digits, with as many decimals as the step has."""
        decimals = max(0, -math.floor(math.log10(self.step)))
        return _signed(f"{abs(value):.{decimals}f}", value)


def even_scale(values: Sequence[float]) -> Linear:
    """Return the even scale that shows these values and zero, with at most eight steps."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    # A little air past the outermost values; none where nothing lies.
    low, high = low * 1.04, high * 1.04
    if low == high:
        high = 1.0
    least = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    return Linear(low, high, step)


def _signed(digits: str, value: float) -> str:
    return "0" if not value else ("+" if value > 0 else MINUS) + digits


def _decade(value: float) -> int:
    return math.ceil(math.log10(value))


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the function that maps low..high to start..end."""
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _value(value: object) -> str:
    return number(value) if isinstance(value, float) else escape(value)
