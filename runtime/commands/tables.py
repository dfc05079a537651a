"""Plans and measurements as tables for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Group, OverflowMethod, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from alloc_moe.runtime.artifact.digest import DataDigest
from alloc_moe.runtime.artifact.plan import AllocationPlan, PlannedLayer
from alloc_moe.runtime.console import printable
from alloc_moe.runtime.measure.bench import Measurement, Workload

_BAR = 16


def plan_table(
    plan: AllocationPlan,
    *,
    name: str,
    digests: Mapping[str, DataDigest] = MappingProxyType({}),
    step: str | None = None,
) -> RenderableType:
    """Return what a plan says: the budget, how it was decided, and a row per MoE layer.

    Args:
        plan: The plan.
        name: The artifact's.
        digests: What its data files must hold.
        step: Whether it has a step program, or why not; None where it could have none.
    """
    budget = plan.budget
    planned, share = _mean(budget.activations), budget.activations / budget.original
    facts = {
        "artifact": name,
        "compiled from": plan.source,
        "budget": f"{budget.requested} -> {planned} of {budget.original} activations "
        f"per token ({share:.1%})",
        "redistribution": plan.redistribution,
        "weights": plan.weights,
        **_optional(plan),
        **({} if step is None else {"step program": step}),
        "sensitivity": _pairs(plan.sensitivity),
        "verified": _pairs(plan.verify),
        "versions": _pairs(plan.versions),
        "data": ", ".join(
            f"{file}, {digest.size} bytes in {len(digest.blocks)} blocks"
            for file, digest in digests.items()
        ),
    }
    listing = Table.grid(padding=(0, 2))
    for fact, value in facts.items():
        listing.add_row(Text(fact, style="bold"), _text(value or "-", overflow="fold"))
    return Group(listing, Text(), _layers(plan))


def speed_table(
    artifacts: Sequence[str],
    measurements: Sequence[Measurement],
    workload: Workload,
    *,
    setting: Mapping[str, Any],
) -> RenderableType:
    """Return a row per artifact: median, slowest and fastest run, times the first one's speed."""
    table = Table(
        title=f"Tokens per second, median of {workload.runs} runs made in turns",
        caption=f"Prefill of {workload.prompt_tokens} tokens; decode of {workload.new_tokens} "
        f"after {workload.past}.\n{escape(_pairs(setting))}",
        caption_justify="left",
    )
    table.add_column("artifact", overflow="fold")
    for heading in ("prefill", "min - max", "ratio", "decode", "min - max", "ratio"):
        table.add_column(heading, justify="right")
    first = measurements[0]
    for artifact, measurement in zip(artifacts, measurements, strict=True):
        row = []
        for speed, reference in (
            (measurement.prefill, first.prefill),
            (measurement.decode, first.decode),
        ):
            spread = f"{min(speed.runs):.1f} - {max(speed.runs):.1f}"
            row += [f"{speed.median:.1f}", spread, f"{speed.ratio(reference):.2f}x"]
        table.add_row(_text(artifact), *row)
    return table


def _optional(plan: AllocationPlan) -> dict[str, str]:
    """What only some redistributions have; a row that doesn't apply is left out."""
    dial = ", ".join(f"{point.activations:.4g} at {point.price:.3g}" for point in plan.dial)
    own = sum(layer.token_sizes is not None for layer in plan.layers)
    facts = {
        "price": "" if plan.price is None else f"{plan.price:.3g} per activation",
        "dial": dial and f"activations {dial}",
        "overlap": "" if plan.overlap is None else f"{plan.overlap:g}",
        "token sizes": f"in {own} of {len(plan.layers)} layers" if own else "",
        "cap": "" if plan.cap is None else f"{plan.cap:g} times k in every call",
        "correction": _pairs(plan.correction),
        "cost": _pairs(plan.cost),
        "quantization": _pairs(plan.quantization),
        "target": _pairs(plan.target),
    }
    return {fact: value for fact, value in facts.items() if value}


def _mean(activations: float) -> str:
    return str(activations) if activations == int(activations) else f"{activations:.2f}"


def _layers(plan: AllocationPlan) -> Table:
    thresholds = any(layer.threshold is not None for layer in plan.layers)
    mixed = len({layer.bits for layer in plan.layers}) > 1
    table = Table()
    table.add_column("layer", overflow="fold")
    optional = (*["bits"] * mixed, *["threshold"] * thresholds)
    for heading in ("experts", "k trained", "k", *optional):
        table.add_column(heading, justify="right")
    table.add_column("share", no_wrap=True)
    for layer in plan.layers:
        table.add_row(
            _text(layer.name),
            str(layer.experts),
            str(layer.k_original),
            _mean(layer.k),
            *([str(layer.bits)] * mixed),
            *([_threshold(layer)] * thresholds),
            _bar(layer.k / layer.k_original),
        )
    return table


def _threshold(layer: PlannedLayer) -> str:
    return "-" if layer.threshold is None else f"{layer.threshold:.4g}"


def _text(words: str, *, overflow: OverflowMethod | None = None) -> Text:
    """Return words of an artifact, of which a terminal must not obey any."""
    return Text(printable(words, keep=""), overflow=overflow)


def _bar(share: float) -> Text:
    full = round(share * _BAR)
    return Text.assemble(("█" * full, "green"), ("░" * (_BAR - full), "dim"), f" {share:4.0%}")


def _pairs(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in facts.items())


def _short(value: Any) -> str:  # any JSON value
    """Return a value on little room: numbers rounded, a checksum by its start."""
    if isinstance(value, float):
        return f"{value:.4g}" if value else "0"
    if isinstance(value, list | tuple):
        counts = Counter(map(str, value))
        return "/".join(f"{name} x{count}" for name, count in counts.items())
    text = str(value)
    is_checksum = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    return f"{text[:12]}..." if is_checksum else text
