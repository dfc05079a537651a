"""The sections that compare methods: their losses, their ranks, their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from alloc_moe.compiler.sweep.report.curves import describe, loss_chart, method_panels
from alloc_moe.compiler.sweep.report.data import (
    OVERSPENT,
    Digest,
    Summary,
    bare,
    percent,
    share,
    signed,
)
from alloc_moe.compiler.sweep.report.sections import fold, section
from alloc_moe.compiler.sweep.report.svg import Style, element, escape, key, linear, marker
from alloc_moe.compiler.sweep.report.tables import results_table, runs_table, spread_text

# Per cent of the track: a second marker nearer than this would only blur the first.
_APART = 1.5


def loss_section(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return the main chart, for wide and for narrow screens, and under it the list of methods."""
    if not digest.summaries:
        return ""
    seeds = len(digest.results.calibration.seeds)
    spread = " The shaded band reaches from the lowest seed to the highest." if seeds > 1 else ""
    how = (
        "Lower is better; zero is the full model. Points lie at the experts that "
        f"<b>really ran</b>, grid lines at the budgets asked for.{spread} "
        "The scale is logarithmic, but linear around zero, so that zero and gains have a place."
    )
    chart = [loss_chart(digest, styles, width=1054, names=True)]
    chart.append(loss_chart(digest, styles, width=360, names=False))
    return section(
        "What fewer experts cost",
        how,
        element("div", {"class": "panel main"}, *chart, _ranks(digest, styles)),
    )


def results_section(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return the table of all methods and budgets, and under it every single run, folded."""
    seeds = len(digest.results.calibration.seeds)
    alone = any(summary.decode for summary in digest.summaries.values())
    decode = "<b>One by one</b>: with one token per call, as in decoding. " if alone else ""
    mean = f"Mean over {seeds} seeds ± half the distance between lowest and highest. "
    how = (
        f"Added loss in nats per token. {mean if seeds > 1 else ''}Below it the experts that a "
        "token really ran, over all layers. <b>Bold</b>: the lowest loss at that budget. "
        + decode
        + escape(_overspent_note(digest))
    )
    table = results_table(digest, styles)
    return section("All results", how, table, fold("Every run", runs_table(digest.results)))


def panels_section(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return a small chart per method, nothing for a single method."""
    panels = method_panels(digest, styles)
    if len(panels) < 2:
        return ""
    figures = "".join(
        element(
            "figure",
            {"class": "own"} if method == digest.subject else {},
            element("h3", {}, key(styles[method], width=28), escape(bare(method))),
            drawn,
        )
        for method, drawn in panels
    )
    how = "The same curves one by one, from best to worst, all others in grey behind."
    return section("Method by method", how, element("div", {"class": "grid"}, figures))


def _ranks(digest: Digest, styles: Mapping[str, Style]) -> str:
    """Return the legend: methods by added loss at the reference budget, with their range."""
    found = [s for s in (digest.get(m, digest.reference) for m in digest.methods) if s]
    values = [v for s in found for v in (s.added.low, s.added.high)]
    values += [s.decode.mean for s in found if s.decode]
    x = linear(min([0.0, *values]), max([0.0, *values]), 0, 100)
    items = []
    for rank, method in enumerate(digest.methods, start=1):
        summary, style = digest.get(method, digest.reference), styles[method]
        badge = ' <span class="badge">default</span>' if method == digest.default else ""
        track = _track(summary, style, x) if summary else ""
        figure = "not measured"
        if summary:
            used = f"{summary.activations.mean:.1f}{' †' if summary.overspent else ''}"
            figure = f"<b>{signed(summary.added.mean)}</b> {spread_text(summary)}"
            figure += f" <small>({used})</small>"
        items.append(
            element(
                "li",
                {"class": style.css, "data-method": style.css.split()[1]},
                element("span", {"class": "rank"}, str(rank)),
                key(style),
                f'<span class="who" style="color:var(--ink)">{escape(bare(method))}{badge}</span>',
                element("span", {"class": "track", "aria-hidden": "true"}, track),
                f'<span class="figure" style="color:var(--ink)">{figure}</span>',
            )
        )
    alone = any(s.decode for s in found)
    note = (
        f"Ranked at {share(digest.reference)}: added loss, in brackets the experts that ran. "
        + ("Filled: many tokens per call; hollow, if elsewhere: one token per call. " * alone)
        + _overspent_note(digest)
    )
    return element("ol", {"class": "ranks"}, *items) + element(
        "p", {"class": "how", "style": "margin:10px 0 0"}, escape(note)
    )


def _track(summary: Summary, style: Style, place: Callable[[float], float]) -> str:
    added, parts = summary.added, [f'<i class="zero" style="left:{place(0.0):.2f}%"></i>']
    low, high = place(added.low), place(added.high)
    parts.append(f'<i class="seeds" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>')
    dots = [("", added.mean)]
    if summary.decode and abs(place(summary.decode.mean) - place(added.mean)) >= _APART:
        start, end = sorted((place(added.mean), place(summary.decode.mean)))
        parts.append(f'<i class="reach" style="left:{start:.2f}%;width:{end - start:.2f}%"></i>')
        dots.insert(0, (" alone", summary.decode.mean))
    for css, value in dots:
        drawn = element(
            "svg",
            {"width": 16, "height": 16, "viewBox": "0 0 16 16", "aria-hidden": "true"},
            element("title", {}, escape(describe(summary))),
            marker(style.shape, 8, 8, 5),
        )
        parts.append(f'<i class="dot{css}" style="left:{place(value):.2f}%">{drawn}</i>')
    return "".join(parts)


def _overspent_note(digest: Digest) -> str:
    if not any(summary.overspent for summary in digest.summaries.values()):
        return ""
    return f"† ran over {percent(OVERSPENT - 1)} more experts than asked for: not compared."
