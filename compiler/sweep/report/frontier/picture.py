"""The chart of loss against bytes as a picture of its own, for a README: light and dark."""

from __future__ import annotations

from collections.abc import Mapping

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.frontier.chart import (
    frontier_axes,
    frontier_frame,
    frontier_marks,
    way_styles,
)
from alloc_moe.compiler.sweep.report.frontier.points import Frontier, headline, unbeaten
from alloc_moe.compiler.sweep.report.picture import HEIGHT, card
from alloc_moe.compiler.sweep.report.svg import Style, group, marker, path, text

_RIGHT = 548
_GAP = 41  # from way to way in the legend
# What its chart has more than that of budgets.
_STYLE = """.target { fill: transparent }
.whisker { stroke: currentColor; stroke-width: 1.4 }
.thread { fill: none; stroke: currentColor; stroke-width: 1.2; opacity: .5 }
.faint .mark, .faint .whisker { opacity: .4 }
.frontier { fill: none; stroke: #1f2328; stroke-width: 2; stroke-linejoin: round }
.m5 { color: #0b7285 } .m6 { color: #8a5a00 } .m7 { color: #b8255f }
.m8 { color: #4457d6 } .m9 { color: #55700f }
@media (prefers-color-scheme: dark) {
.frontier { stroke: #f0f6fc }
.m5 { color: #4fcbd6 } .m6 { color: #e2b04a } .m7 { color: #ff86ad }
.m8 { color: #9caeff } .m9 { color: #b3cc5c }
}
"""


def draw_frontier(results: SweepResults) -> str:
    """Return loss against bytes per token as one SVG file, nothing to load."""
    frontier = Frontier(results)
    styles = way_styles(frontier)
    frame = frontier_frame(frontier, (62, _RIGHT, 88, HEIGHT - 60))
    middle = (frame.left + frame.right) / 2
    caption = "bytes of weights that a token reads, on held-out text"
    name = results.model.rstrip("/").rpartition("/")[2]
    seeds = len(results.calibration.seeds)
    mean = f": mean and range of {seeds} seeds" if seeds > 1 else ""
    return card(
        f"{name}: bits and experts for the same bytes",
        f"Added loss on held-out text, nats per token{mean}. Lower and left is better.",
        _in_words(frontier),
        frontier_axes(
            frontier,
            frame,
            text(middle, frame.bottom + 40, caption, css="axis", anchor="middle"),
        ),
        *frontier_marks(frontier, frame, styles),
        *_legend(frontier, styles),
        style=_STYLE,
    )


def _legend(frontier: Frontier, styles: Mapping[str, Style]) -> list[str]:
    gap = min(_GAP, (HEIGHT - 130) / max(len(frontier.methods), 1))
    left, top = _RIGHT + 24, 96
    drawn = []
    for place, method in enumerate(frontier.methods):
        y = top + place * gap
        drawn.append(
            group(
                f"key {styles[method].css}",
                marker(styles[method].shape, left, y, 5.2),
                text(left + 14, y + 5, method, css="name"),
                text(left + 14, y + 21, unbeaten(frontier.row(method)), css="what"),
            )
        )
    y = min(top + len(frontier.methods) * gap + 4, HEIGHT - 24)
    drawn.append(path([(left - 7, y), (left + 7, y)], css="frontier"))
    drawn.append(text(left + 14, y + 5, "beaten by no other", css="what"))
    return drawn


def _in_words(frontier: Frontier) -> str:
    """Return what the picture shows, for those who can't see it."""
    said = [f"{headline(frontier)}.", "No other point reads less and loses less than these:"]
    for point in frontier.best:
        value = f"{point.added.mean:+.4f} nats at {point.read.mean:.0f} bytes"
        said.append(f"{point.method}, {point.k}: {value}.")
    return " ".join(said)
