"""What ways give for the same bytes, as tables: Markdown, HTML."""

from __future__ import annotations

from collections.abc import Mapping

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.data import Estimate, signed
from alloc_moe.compiler.sweep.report.frontier.points import Frontier, Point, Quantity, size
from alloc_moe.compiler.sweep.report.svg import DASH, Style, element, escape, key
from alloc_moe.compiler.sweep.report.tables import html_table


def frontier_markdown(results: SweepResults) -> str:
    """Return ways by targets, twice: added loss, and the divergence from the full model.

    Of plain ways the largest k within a target. Brackets have the experts that really ran; the
    lowest of each column among those that kept to it is bold.
    """
    frontier = Frontier(results)
    tables = [_markdown(frontier, "added loss", lambda point: point.added)]
    if all(point.divergence for point in frontier.points):
        tables.append(_markdown(frontier, "divergence", lambda point: point.divergence))
    return "\n".join(tables)


def ways_table(frontier: Frontier, styles: Mapping[str, Style]) -> str:
    """Return ways by targets in HTML: added loss, bytes and experts."""
    rows = []
    for method in frontier.methods:
        name = key(styles[method], width=26) + " " + escape(method)
        found = (frontier.get(method, target) for target in frontier.targets)
        least = [frontier.least(target) for target in frontier.targets]
        rows.append([name, *(_html(point, point in least) for point in found)])
    heads = ["way", *(f"{size(target)} <small>at most</small>" for target in frontier.targets)]
    return html_table("Added loss by way and target", heads, rows)


def points_table(frontier: Frontier) -> str:
    """Return every point, from few bytes to many."""
    rows = [
        [
            escape(point.method),
            point.k if point.plain else size(point.target),
            *(f"{point.read.mean:.0f}", f"{point.activations.mean:.2f}"),
            "/".join(map(str, point.cells[0].bits_per_layer)),
            signed(point.added.mean) + (f" {_spread(point.added)}" if _spread(point.added) else ""),
            f"{point.divergence.mean:.4f}" if point.divergence else DASH,
            "best" if point.best else "",
        ]
        for point in sorted(frontier.points, key=lambda point: point.read.mean)
    ]
    heads = ["way", "asked for", "bytes read", "experts", "bits by layer", "added loss"]
    return html_table("Every point", [*heads, "divergence", "beaten by none"], rows)


def _markdown(frontier: Frontier, what: str, of: Quantity) -> str:
    rows = [[what, *map(size, frontier.targets)], ["---", *("---:" for _ in frontier.targets)]]
    least = [frontier.least(target, of) for target in frontier.targets]
    for method in frontier.methods:
        found = [frontier.get(method, target) for target in frontier.targets]
        cells = (
            _cell(point, of(point), bold=point is best) if point else ""
            for point, best in zip(found, least, strict=True)
        )
        rows.append([method, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(point: Point, found: Estimate | None, *, bold: bool) -> str:
    assert found is not None
    is_loss = found is point.added
    value = signed(found.mean, minus="-") if is_loss else f"{found.mean:.4f}"
    if spread := _spread(found):
        value += f" {spread}"
    if bold:
        value = f"**{value}**"
    ran = point.k if point.plain else f"{point.activations.mean:.1f}"
    return f"{value} ({ran}{', over' if point.overspent else ''})"


def _spread(found: Estimate) -> str:
    """Return half the spread over seeds, nothing where there is none."""
    return f"±{found.half_spread:.4f}" if found.high > found.low else ""


def _html(point: Point | None, best: bool) -> str:
    if not point:
        return element("span", {"class": "none", "aria-label": "no plan reads so little"}, DASH)
    value = signed(point.added.mean)
    shown = element("strong", {}, value) if best else value
    if _spread(point.added):
        shown += " " + element("small", {}, _spread(point.added))
    below = f"{size(point.read.mean)}, {point.k}{' †' * point.overspent}"
    return shown + element("span", {"class": "below"}, below)
