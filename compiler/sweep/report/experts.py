"""The sections that show where the experts go: to which layers, to which tokens, and why."""

from __future__ import annotations

from collections.abc import Mapping

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.data import Digest, bare, percent, share
from alloc_moe.compiler.sweep.report.layers import (
    heat_map,
    layer_bars,
    spark,
    token_histogram,
    token_rows,
)
from alloc_moe.compiler.sweep.report.sections import fold, section
from alloc_moe.compiler.sweep.report.svg import DASH, Style, element, escape, key
from alloc_moe.compiler.sweep.report.tables import (
    cost_table,
    html_table,
    layers_table,
    tokens_table,
)


def layers_section(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return the experts that each layer ran: the subject's as bars, all methods' word-sized."""
    row = digest.row(digest.subject or "")
    if not row:
        return ""
    results = digest.results
    subject = row[0].method
    figures = "".join(
        element(
            "figure",
            {},
            element(
                "h3",
                {},
                f"{percent(summary.budget)} <small>ran {summary.activations.mean:.1f}</small>",
            ),
            layer_bars(summary, results),
        )
        for summary in row
    )
    how = (
        f"<b>{escape(bare(subject))}</b>: bars are the experts a token ran in each layer, on "
        "average; the line across each is what was planned. The scale ends at the full model."
    )
    cells = [
        [
            f"{key(styles[method], width=26)} {escape(method)}",
            *(spark(s, results) if (s := digest.get(method, b)) else DASH for b in digest.budgets),
        ]
        for method in digest.methods
    ]
    marked = [
        [line[0], *(element("span", {"class": styles[method].css}, cell) for cell in line[1:])]
        for method, line in zip(digest.methods, cells, strict=True)
    ]
    heads = ["method", *(percent(budget) for budget in digest.budgets)]
    table = html_table("Experts per layer, by method and budget", heads, marked)
    others = element("div", {"class": "sparks"}, table) if len(cells) > 1 else ""
    return section(
        "Where the experts go",
        how,
        element("div", {"class": "flow m0"}, figures),
        fold("Numbers", layers_table(results, row)),
        fold("All methods", others, is_open=True) if others else "",
    )


def tokens_section(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return how many experts tokens ran: each method over all layers, the subject by layer."""
    results = digest.results
    row = digest.row(digest.subject or "")
    compared = [s for m in digest.methods if (s := digest.get(m, digest.reference))]
    if not row or not compared:
        return ""
    small = "".join(
        element(
            "figure",
            {"class": styles[s.method].css.split()[0]},
            f"<h3>{key(styles[s.method], width=28)}{escape(bare(s.method))}</h3>",
            token_histogram(s, results),
        )
        for s in compared
    )
    large = "".join(
        element("figure", {}, element("h3", {}, percent(s.budget)), token_rows(s, results))
        for s in row
    )
    tables = "".join(tokens_table(results, s) for s in row)
    how = (
        f"At {share(digest.reference)}: the share of tokens, over all layers, for which so many "
        "experts ran. One tall bar treats all tokens alike; a wide shape gives more to some."
    )
    below = (
        f'<p class="how" style="margin-top:22px"><b>{escape(bare(row[0].method))}</b>, layer by '
        "layer: each row is a layer, bars are shares of its tokens, the diamond is the mean.</p>"
    )
    return section(
        "Who gets them: experts per token",
        how,
        element("div", {"class": "grid small"}, small),
        below,
        element("div", {"class": "grid large m0"}, large),
        fold("Numbers", tables),
    )


def sensitivities_section(results: SweepResults) -> str:
    """Return a map per measured sensitivity, nothing where none was measured."""
    if not results.sensitivities:
        return ""
    figures = []
    for sensitivity in results.sensitivities:
        under = escape(sensitivity.redistribution)
        if sensitivity.correction != "none":
            under += f" + {escape(sensitivity.correction)}"
        title = f"{escape(sensitivity.metric)} <small>under {under}, "
        title += f"{sensitivity.seconds:.1f} s</small>"
        figures.append(
            element("figure", {}, element("h3", {}, title), heat_map(sensitivity, results))
        )
    tables = "".join(cost_table(results, index) for index in range(len(figures)))
    how = (
        "The cost of running only k experts in one layer; the stronger the colour, the higher. "
        "Read along a row how soon a layer suffers, down a column which layers suffer first."
    )
    return section(
        "How much each layer needs its experts",
        how,
        element("div", {"class": "flow"}, *figures),
        fold("Numbers", tables),
    )
