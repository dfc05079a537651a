"""A sweep's main chart as a picture of its own, for a README: a few lines, light and dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from alloc_moe.compiler.sweep.methods import PRESETS
from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.axes import Frame, axes, band, make_frame, route
from alloc_moe.compiler.sweep.report.data import Digest, bare, headline, percent, signed
from alloc_moe.compiler.sweep.report.svg import (
    Style,
    element,
    escape,
    even_scale,
    group,
    marker,
    path,
    rect,
    shorten,
    spread,
    text,
)

WIDTH, HEIGHT = 800, 450
_LABEL_LETTERS = 28
_LOOKS = (
    Style("m0 own", "circle", ""),
    Style("m1", "square", "2 3"),
    Style("m2", "up", "7 3"),
    Style("m3", "down", "9 3 2 3"),
    Style("m4", "diamond", ""),
)
# A card of its own colour, as a page may be light where the browser asks for dark.
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
text { fill: #1f2328; font-variant-numeric: tabular-nums }
.card { fill: #ffffff; stroke: #d1d9e0 }
.head { font-size: 18px; font-weight: 600 }
.tick, .axis, .what { fill: #59636e }
.name { fill: currentColor; font-size: 14px; font-weight: 600 }
.grid { stroke: #e6eaef }
.zero { stroke: #818b98 }
.curve { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
.own .curve { stroke-width: 3.5 }
.own .name { font-weight: 700 }
.mark { fill: currentColor; stroke: #ffffff }
.ring { fill: #ffffff; stroke: #1f2328; stroke-width: 2 }
.band { fill: currentColor; opacity: .14 }
.leader { fill: none; stroke: currentColor; opacity: .45 }
.m0 { color: #c8420b } .m1 { color: #6d675e } .m2 { color: #1f6fb8 }
.m3 { color: #237a35 } .m4 { color: #8a3fb0 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.card { fill: #0d1117; stroke: #3d444d }
.tick, .axis, .what { fill: #9198a1 }
.grid { stroke: #21262d }
.zero { stroke: #656c76 }
.mark { stroke: #0d1117 }
.ring { fill: #0d1117; stroke: #f0f6fc }
.m0 { color: #ff8a50 } .m1 { color: #aaa69e } .m2 { color: #6cb4ff }
.m3 { color: #68cf7d } .m4 { color: #cf93ee }
}
"""


def draw_picture(results: SweepResults) -> str:
    """Return added loss against the activations really run as one SVG file, nothing to load.

    Of many methods it shows few: the default, the published Alloc-MoE, plain top-k and top-p, and
    the best of the others, so that what comes nearest is never hidden.
    """
    looks = _chosen_looks(Digest(results))
    cells = tuple(cell for cell in results.cells if cell.method in looks)
    digest = Digest(dataclasses.replace(results, cells=cells))
    frame = make_frame(digest, (62, 560, 88, HEIGHT - 72), even_scale)
    name = results.model.rstrip("/").rpartition("/")[2]
    title = f"{name}: what running fewer experts costs"
    return card(
        title,
        _what(digest),
        _in_words(digest),
        axes(frame, digest, _caption(frame, digest), counts=True),
        *_series(frame, digest, looks),
        marker("circle", *_full_model(frame, digest), 5.5, css="ring"),
    )


def card(title: str, below: str, words: str, *drawn: str, style: str = "") -> str:
    """Return a picture: a card with a title, a line below it, and what is drawn on it.

    `words` say what it shows, for those who can't see it; `style` is added to the card's own.
    """
    parts = [
        element("title", {"id": "title"}, escape(title)),
        element("desc", {"id": "desc"}, escape(words)),
        element("style", {}, _STYLE + style),
        rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, css="card"),
        text(24, 36, title, css="head"),
        text(24, 59, below, css="what"),
        *drawn,
    ]
    return element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "width": WIDTH,
            "height": HEIGHT,
            "role": "img",
            "aria-labelledby": "title desc",
        },
        *(f"\n{part}" for part in parts),
        "\n",
    )


def _chosen_looks(digest: Digest) -> dict[str, Style]:
    """Return the methods to show; those that are well known look the same in every picture."""
    found = [method for method in digest.methods if digest.row(method)]
    known = (digest.subject, digest.baseline, PRESETS["paper"].name, PRESETS["top-p"].name)
    slots: list[str | None] = [None] * len(_LOOKS)
    for place, method in enumerate(known):
        if method in found and method not in slots:
            slots[place] = method
    others = iter([method for method in found if method not in slots])
    filled = [method or next(others, None) for method in slots]
    return {method: look for method, look in zip(filled, _LOOKS, strict=True) if method}


def _what(digest: Digest) -> str:
    seeds = len(digest.results.calibration.seeds)
    mean = f": mean and range of {seeds} seeds" if seeds > 1 else ""
    stored = sorted({cell.dtype for cell in digest.results.cells} - {"float32"})
    of_weights = f", weights in {', '.join(stored)}" if stored else ""
    return f"Added loss on held-out text{of_weights}, nats per token{mean}. Lower is better."


def _caption(frame: Frame, digest: Digest) -> str:
    full = digest.results.full_activations
    caption = f"experts really run per token ({full} in the full model), fewer to the right →"
    middle = (frame.left + frame.right) / 2
    return text(middle, frame.bottom + 56, caption, css="axis", anchor="middle")


def _full_model(frame: Frame, digest: Digest) -> tuple[float, float]:
    return frame.x(digest.results.full_activations), frame.y(0.0)


def _series(frame: Frame, digest: Digest, looks: Mapping[str, Style]) -> list[str]:
    """Return every method's line with its name at its end, the best drawn last."""
    routes = {method: route(frame, digest, method) for method in digest.methods}
    ends = [points[-1][1] for points in routes.values()]
    places = spread(ends, gap=40, low=frame.top + 2, high=frame.bottom - 22)
    drawn = [
        group(
            f"series {looks[method].css}",
            band(frame, digest.row(method)),
            path(points, css="curve", dash=looks[method].dash),
            *_marks(points, looks[method]),
            *_label(frame, digest, method, place, points[-1]),
        )
        for (method, points), place in zip(routes.items(), places, strict=True)
    ]
    return drawn[::-1]


def _marks(points: Sequence[tuple[float, float]], style: Style) -> list[str]:
    size = 5.2 if "own" in style.css else 4.2
    return [marker(style.shape, x, y, size) for x, y in points[1:]]


def _label(
    frame: Frame, digest: Digest, method: str, place: float, end: tuple[float, float]
) -> list[str]:
    """Return a line's name and, below it, what it loses at the reference budget."""
    at = digest.get(method, digest.reference)
    value = f"{signed(at.added.mean)} at {percent(at.budget)}" if at else ""
    if method == digest.default:
        value = f"default: {value}" if at else "default"
    left = frame.right + 22
    return [
        path([(end[0] + 8, end[1]), (left - 10, place), (left - 5, place)], css="leader"),
        text(left, place + 5, shorten(_short(method), _LABEL_LETTERS), css="name"),
        text(left, place + 22, value, css="what"),
    ]


def _short(method: str) -> str:
    """Return the name under which a method was published, which its label has in brackets."""
    name = bare(method)
    published = name[:-1].partition(" (")[2] if name.endswith(")") else ""
    return published or name


def _in_words(digest: Digest) -> str:
    """Return what the picture shows, for those who can't see it."""
    full = digest.results.full_activations
    said = [f"{headline(digest)}."]
    if digest.methods:
        said.append(f"Added loss in nats per token, at experts run per token, of {full}:")
    for method in digest.methods:
        points = (f"{signed(s.added.mean)} at {s.activations.mean:.1f}" for s in digest.row(method))
        said.append(f"{method}: {', '.join(points)}.")
    return " ".join(said)
