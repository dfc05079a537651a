"""The section of the page on bits and experts: a chart, what it says of each way, its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.frontier.chart import (
    frontier_axes,
    frontier_frame,
    frontier_marks,
    way_styles,
)
from alloc_moe.compiler.sweep.report.frontier.points import Frontier, unbeaten
from alloc_moe.compiler.sweep.report.frontier.tables import points_table, ways_table
from alloc_moe.compiler.sweep.report.sections import fold, section
from alloc_moe.compiler.sweep.report.svg import Style, element, escape, key, svg, text

_HOW = (
    "Lower and further to the left is better. Points lie at the bytes of weights that a token of "
    "the scored text <b>really read</b>, all weights counted. The line joins those that no other "
    "beats: none that reads 1 % more at most loses less. Beaten ones are faint. Plain ways have "
    "one k for all layers, uncorrected: in the table, the largest within the target."
)


def frontier_section(results: SweepResults) -> str:
    """Return the chart of loss against bytes and its numbers; nothing without targets."""
    frontier = Frontier(results)
    if not frontier.points:
        return ""
    styles = way_styles(frontier)
    charts = [
        _chart(frontier, styles, width=1054, height=470, css="chart wide"),
        _chart(frontier, styles, width=360, height=400, css="chart narrow"),
    ]
    return section(
        "Bits and experts for the same bytes",
        _HOW,
        element("div", {"class": "panel main"}, *charts, _legend(frontier, styles)),
        element("div", {"class": "under"}, ways_table(frontier, styles)),
        fold("Every point", points_table(frontier)),
    )


def _chart(
    frontier: Frontier, styles: Mapping[str, Style], *, width: int, height: int, css: str
) -> str:
    frame = frontier_frame(frontier, (58, width - 24, 22, height - 46))
    middle = (frame.left + frame.right) / 2
    captions = (
        text(middle, frame.bottom + 38, "bytes a token reads", css="axis", anchor="middle"),
        text(4, 12, "added loss, nats per token", css="axis"),
    )
    about = "Added loss against bytes read per token; the tables below hold the same numbers"
    drawn = frontier_marks(frontier, frame, styles)
    return svg(width, height, about, frontier_axes(frontier, frame, *captions), *drawn, css=css)


def _legend(frontier: Frontier, styles: Mapping[str, Style]) -> str:
    items = []
    for method in frontier.methods:
        style, ink = styles[method], {"style": "color:var(--ink)"}
        items.append(
            element(
                "li",
                {"class": style.css, "data-method": style.css.split()[1]},
                element("span", {"class": "rank"}, ""),
                key(style),
                element("span", {"class": "who", **ink}, escape(method)),
                element("span", {"class": "track"}, ""),
                element("span", {"class": "figure", **ink}, unbeaten(frontier.row(method))),
            )
        )
    return element("ol", {"class": "ranks"}, *items)
