"""What was measured, as one table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

_UNITS = {"ms": "{:.3f} ms", "GB/s": "{:.0f} GB/s", "logits": "{:.1e}", "tokens equal": "{:.0f}"}
_WHAT = {
    "copy": "memory copy",
    "decode": "step after {past}",
    "batch": "step after {past}, batch {batch}",
    "prefill": "prompt of {prompt}",
    "logits": "largest logit error",
    "tokens": "greedy tokens equal",
}


def with_fractions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with ``floor_fraction``, ``of_full`` and ``of_plain`` where they exist.

    The first is the time that the active weights take at the card's copy speed, over the time
    measured; the others are multiples of the full budget's time by the same path, and of the plain
    operator's at the same budget.
    """
    speed = next((r["value"] for r in records if r["name"].startswith("memory/copy/")), None)
    times = {tuple(r["name"].split("/", 3)): r["value"] for r in records if r.get("unit") == "ms"}
    found = []
    for record in records:
        extra: dict[str, float] = {}
        model, kind, budget, path = record["name"].split("/", 3)
        if record.get("unit") == "ms":
            if speed and "bytes" in record:
                extra["floor_ms"] = record["bytes"] / speed / 1e6
                extra["floor_fraction"] = extra["floor_ms"] / record["value"]
            for name, other in (
                ("of_full", (model, kind, "full", path)),
                ("of_plain", (model, kind, budget, "plain top-k")),
            ):
                if other in times and other != (model, kind, budget, path):
                    extra[name] = record["value"] / times[other]
        found.append({**record, **extra})
    return found


def table(records: Sequence[dict[str, Any]], sizes: dict[str, int]) -> Iterator[str]:
    """Yield the lines of a Markdown table; what failed has its error in place of a figure."""
    yield "| model | what | budget | by | figure | of its byte floor | of full | of plain | note |"
    yield "|---|---|---|---|---:|---:|---:|---:|---|"
    for record in with_fractions(records):
        model, kind, budget, path = record["name"].split("/", 3)
        cells = [model, _WHAT.get(kind, kind).format(**sizes), budget, path, figure(record)]
        for name in ("floor_fraction", "of_full", "of_plain"):
            cells.append(f"{record[name]:.2f}" if name in record else "")
        error = " ".join(record.get("error", "").split())[:200].replace("|", "/")
        cells.append(error or record.get("note", ""))
        yield "| " + " | ".join(cells) + " |"


def figure(record: dict[str, Any]) -> str:
    """Return the value with its unit; with a word where a check failed."""
    if "error" in record:
        return "FAILED"
    value = record["value"]
    if record.get("ok", True):
        return _UNITS[record["unit"]].format(value)
    shown = "no number" if math.isnan(value) else _UNITS[record["unit"]].format(value)
    return f"{shown}, WRONG"
