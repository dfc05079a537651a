"""A sweep's results as one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from alloc_moe.compiler.sweep.records import SweepResults
from alloc_moe.compiler.sweep.report.comparison import loss_section, panels_section, results_section
from alloc_moe.compiler.sweep.report.curves import method_styles
from alloc_moe.compiler.sweep.report.data import Digest, Summary, bare, headline, loss, signed
from alloc_moe.compiler.sweep.report.experts import (
    layers_section,
    sensitivities_section,
    tokens_section,
)
from alloc_moe.compiler.sweep.report.frontier.points import Frontier
from alloc_moe.compiler.sweep.report.frontier.points import headline as frontier_headline
from alloc_moe.compiler.sweep.report.frontier.section import frontier_section
from alloc_moe.compiler.sweep.report.svg import DASH, element, escape

# What the page may do at all: nothing is ever fetched, not even by mistake.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(results: SweepResults) -> str:
    """Return the report: one HTML document, charts drawn, nothing to load."""
    digest = Digest(results)
    styles = method_styles(digest)
    sections = [
        _header(digest, results),
        frontier_section(results),
        loss_section(digest, styles),
        results_section(digest, styles),
        panels_section(digest, styles),
        layers_section(digest, styles),
        tokens_section(digest, styles),
        sensitivities_section(results),
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


def _header(digest: Digest, results: SweepResults) -> str:
    finding = headline(digest) if digest.summaries else frontier_headline(Frontier(results))
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
    if stored := {cell.dtype for cell in digest.results.cells} - {"float32"}:
        facts["budgets in"] = ", ".join(sorted(stored))
    cells = (
        element("div", {}, element("dt", {}, name), element("dd", {}, value))
        for name, value in facts.items()
    )
    return element(
        "header",
        {},
        f'<p class="eyebrow"><b>alloc-sweep</b> · {escape(results.model)} · '
        f"{escape(results.family)}</p>",
        element("h1", {}, escape(finding)),
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


def _value(summary: Summary) -> str:
    return f"{signed(summary.added.mean)} nats at {summary.activations.mean:.1f} experts"


def _pairs(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())


def _range(counts: tuple[int, ...]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}{DASH}{high}"
