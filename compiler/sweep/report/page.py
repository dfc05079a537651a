"""A sweep's results as one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.curves import (
    describe,
    loss_chart,
    method_panels,
    method_styles,
)
from alloc_moe.compiler.sweep.report.data import (
    OVERSPENT,
    Digest,
    Summary,
    bare,
    headline,
    loss,
    percent,
    share,
    signed,
)
from alloc_moe.compiler.sweep.report.layers import (
    heat_map,
    layer_bars,
    spark,
    token_histogram,
    token_rows,
)
from alloc_moe.compiler.sweep.report.svg import DASH, Style, element, escape, key, linear, marker
from alloc_moe.compiler.sweep.report.tables import (
    cost_table,
    html_table,
    layers_table,
    markdown_table,
    results_table,
    runs_table,
    spread_text,
    to_csv,
    tokens_table,
)

__all__ = ["markdown_table", "render", "to_csv"]

# Per cent of the track: a second marker nearer than this would only blur the first.
_APART = 1.5
# What the page may do at all: nothing is ever fetched, not even by mistake.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(results: SweepResults) -> str:
    """Return the report: one HTML document, charts drawn, nothing to load."""
    digest = Digest(results)
    styles = method_styles(digest)
    sections = [
        _header(digest),
        _losses(digest, styles),
        _results(digest, styles),
        _panels(digest, styles),
        _layers(digest, styles),
        _tokens(digest, styles),
        _sensitivities(results),
    ]
    style, script = (
        resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8")
        for kind in ("css", "js")
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(results.model)}: experts and loss</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n"
        f"{_footer(results)}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _header(digest: Digest) -> str:
    results = digest.results
    seeds, full = len(results.calibration.seeds), results.full_activations
    plural = "" if seeds == 1 else "s"
    facts = {
        "full model": f"{loss(results.full_loss)} <small>nats per token</small>",
        "MoE layers": f"{len(results.layers)} <small>{_range(results.experts)} experts</small>",
        "experts per token": f"{full} <small>{_range(results.experts_per_token)} a layer</small>",
        "scored on": f"{results.text.tokens:,} <small>tokens</small>",
        "calibrated on": f"{results.calibration.tokens:,} "
        f"<small>tokens, {seeds} seed{plural}</small>",
    }
    cells = (
        element("div", {}, element("dt", {}, name), element("dd", {}, value))
        for name, value in facts.items()
    )
    return element(
        "header",
        {},
        f'<p class="eyebrow"><b>alloc-sweep</b> · {escape(results.model)} · '
        f"{escape(results.family)}</p>",
        element("h1", {}, escape(headline(digest))),
        element("p", {"class": "lead"}, escape(_lead(digest))),
        element("dl", {"class": "facts"}, "".join(cells)),
    )


def _lead(digest: Digest) -> str:
    """Return what the headline leaves out: what really ran, and who was best."""
    subject = digest.get(digest.subject, digest.reference)
    if not subject:
        return ""
    full = digest.results.full_activations
    ran = [f"{subject.activations.mean:.1f} with {bare(subject.method)}"]
    plain = digest.get(digest.baseline, digest.reference)
    if plain and plain.method != subject.method:
        ran.append(f"{plain.activations.mean:.1f} with {bare(plain.method)}")
    said = [f"Measured experts per token: {', '.join(ran)}, of {full} in the full model."]
    best = digest.best(digest.reference)
    if best and best.method != subject.method:
        said.append(f"The lowest loss here is that of {bare(best.method)}: {_value(best)}.")
    if subject.overspent:
        said.append(f"{bare(subject.method)} ran more experts than asked for.")
    return " ".join(said)


def _losses(digest: Digest, styles: Mapping[str, Style]) -> str:
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
    return _section(
        "What fewer experts cost",
        how,
        element("div", {"class": "panel main"}, *chart, _ranks(digest, styles)),
    )


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


def _results(digest: Digest, styles: Mapping[str, Style]) -> str:
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
    return _section("All results", how, table, _fold("Every run", runs_table(digest.results)))


def _panels(digest: Digest, styles: Mapping[str, Style]) -> str:
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
    return _section("Method by method", how, element("div", {"class": "grid"}, figures))


def _layers(digest: Digest, styles: Mapping[str, Style]) -> str:
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
    return _section(
        "Where the experts go",
        how,
        element("div", {"class": "flow m0"}, figures),
        _fold("Numbers", layers_table(results, row)),
        _fold("All methods", others, is_open=True) if others else "",
    )


def _tokens(digest: Digest, styles: Mapping[str, Style]) -> str:
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
    return _section(
        "Who gets them: experts per token",
        how,
        element("div", {"class": "grid small"}, small),
        below,
        element("div", {"class": "grid large m0"}, large),
        _fold("Numbers", tables),
    )


def _sensitivities(results: SweepResults) -> str:
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
    return _section(
        "How much each layer needs its experts",
        how,
        element("div", {"class": "flow"}, *figures),
        _fold("Numbers", tables),
    )


def _footer(results: SweepResults) -> str:
    text, calibration = results.text, results.calibration
    facts = {
        "command": element("code", {}, escape(results.command)),
        "date": escape(results.date),
        "model": f"{escape(results.model)} ({escape(results.family)})",
        "scored text": f"{escape(text.name)}, {text.tokens:,} tokens, "
        f"SHA-256 <code>{escape(text.sha256)}</code>",
        "calibration": f"{escape(calibration.name)}, {calibration.tokens:,} tokens, seeds "
        f"{', '.join(map(str, calibration.seeds))}, SHA-256 "
        f"<code>{escape(calibration.sha256)}</code>",
        "machine": _pairs(results.machine),
        "versions": _pairs(results.versions),
    }
    items = (
        element("dt", {}, name) + element("dd", {}, value or DASH) for name, value in facts.items()
    )
    listing = element("dl", {}, *items)
    return f"<footer><div><h2>How this was made</h2>{listing}</div></footer>"


def _overspent_note(digest: Digest) -> str:
    if not any(summary.overspent for summary in digest.summaries.values()):
        return ""
    return f"† ran over {percent(OVERSPENT - 1)} more experts than asked for: not compared."


def _value(summary: Summary) -> str:
    return f"{signed(summary.added.mean)} nats at {summary.activations.mean:.1f} experts"


def _pairs(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())


def _range(counts: tuple[int, ...]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}{DASH}{high}"


def _section(title: str, how: str, *content: str) -> str:
    head = element("h2", {}, escape(title)) + element("p", {"class": "how"}, how)
    return element("section", {}, head, *content)


def _fold(title: str, content: str, *, is_open: bool = False) -> str:
    attributes = {"open": ""} if is_open else {}
    return element("details", attributes, element("summary", {}, escape(title)), content)
