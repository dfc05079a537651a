"""Charts with one row or column per layer: sensitivities, experts per layer, experts per token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from alloc_moe.compiler.sweep.records import Sensitivity, SweepResults
from alloc_moe.compiler.sweep.report.data import Summary, figure, mean_rows, percent
from alloc_moe.compiler.sweep.report.svg import (
    TIMES,
    group,
    line,
    linear,
    marker,
    rect,
    svg,
    text,
)

SHADES = 9
# From so many layers on, rows get thin and values are left to tooltips and tables.
_MANY = 20


def layer_labels(results: SweepResults) -> list[str]:
    """Return a short label per MoE layer: the decoder layer's number, else a running number."""
    found = [re.search(r"\.(\d+)(?:\.|$)", name) for name in results.layers]
    labels = [match[1] if match else str(i) for i, match in enumerate(found)]
    unique = len(set(labels)) == len(labels)
    return labels if unique else [str(i) for i in range(len(results.layers))]


def heat_map(sensitivity: Sensitivity, results: SweepResults) -> str:
    """Return a layer-by-k map of costs; the stronger the colour, the higher the cost."""
    costs, labels = sensitivity.costs, layer_labels(results)
    most = max((len(row) for row in costs), default=1)
    many = len(costs) > _MANY
    height = 13 if many else 26
    width = max(26.0, min(46.0, 420 / most))
    shades = _shades([value for row in costs for value in row])
    exponent = _exponent([value for row in costs for value in row])
    left, top = 34, 34
    drawn = [text(left, 12, "experts per token, k →", css="axis")]
    for k in range(1, most + 1):
        x = left + (k - 0.5) * width
        drawn.append(text(x, top - 7, k, css="tick", anchor="middle"))
    for index, row in enumerate(costs):
        y = top + index * height
        drawn.append(text(left - 7, y + height / 2 + 4, labels[index], css="tick", anchor="end"))
        for k, cost in enumerate(row, start=1):
            tip = f"{results.layers[index]}, k = {k}\n{sensitivity.metric} {figure(cost, '.6g')}"
            cell = _heat_cell(left + (k - 1) * width, y, (width, height), shades(cost))
            if not many and width >= 34 and math.isfinite(cost):
                value = _compact(cost / 10.0**exponent)
                shade = f"on{shades(cost)}"
                middle = (left + (k - 0.5) * width, y + height / 2 + 4)
                cell += text(*middle, value, css=shade, anchor="middle")
            drawn.append(group("tip", cell, title=tip))
    bottom = top + len(costs) * height
    drawn.append(_scale_strip(left, bottom + 14, costs, exponent, shown=not many and width >= 34))
    about = f"Sensitivity of each layer by {sensitivity.metric}: cost of k experts, layer by k"
    total = max(left + most * width + 4, left + SHADES * 16 + 195)
    return svg(total, bottom + 48, about, *drawn, css="chart")


def layer_bars(summary: Summary, results: SweepResults) -> str:
    """Return the experts each layer ran per token at one budget; a tick marks what was planned."""
    labels, count = layer_labels(results), len(results.layers)
    used = mean_rows([cell.activations_per_layer for cell in summary.cells])
    planned = mean_rows([cell.planned_per_layer for cell in summary.cells])
    # Few layers get a narrow panel rather than wide bars.
    left, top, bottom = 24, 18, 128
    width = left + min(max(25 * count, 150), 294)
    most = max(results.experts_per_token, default=1)
    y = linear(0, most, bottom, top)
    step = (width - left) / max(count, 1)
    drawn = []
    for tick in sorted({0, most // 2, most}):
        drawn.append(line(left, y(tick), width, y(tick), css="grid" if tick else "zero"))
        drawn.append(text(left - 5, y(tick) + 4, tick, css="tick", anchor="end"))
    every = math.ceil(22 / step)
    for index, (value, plan) in enumerate(zip(used, planned, strict=True)):
        x = left + index * step
        gap = step * 0.14
        tip = (
            f"{results.layers[index]}\nran {value:.2f} of {results.experts_per_token[index]} "
            f"experts per token\nplanned {plan:.2f}"
        )
        parts = [
            rect(x + gap, y(value), step - 2 * gap, bottom - y(value), css="bar"),
            line(x + gap / 2, y(plan), x + step - gap / 2, y(plan), css="plan"),
        ]
        if step >= 24:
            above = min(y(value), y(plan)) - 4
            parts.append(text(x + step / 2, above, f"{value:.1f}", css="value", anchor="middle"))
        parts.append(rect(x, top, step, bottom - top, css="target"))
        drawn.append(group("tip", *parts, title=tip))
        if index % every == 0:
            middle = x + step / 2
            drawn.append(text(middle, bottom + 15, labels[index], css="tick", anchor="middle"))
    drawn.append(text((left + width) / 2, bottom + 31, "layer", css="axis", anchor="middle"))
    about = (
        f"Experts per token that {summary.method} ran in each layer, "
        f"asked for {percent(summary.budget)}"
    )
    return svg(width + 4, bottom + 36, about, *drawn, css="chart")


def spark(summary: Summary, results: SweepResults) -> str:
    """Return a word-sized chart of the experts each layer ran per token."""
    used = mean_rows([cell.activations_per_layer for cell in summary.cells])
    most = max(results.experts_per_token, default=1)
    width, height = 104.0, 30.0
    step = width / max(len(used), 1)
    gap = 1.0 if step > 4 else 0.0  # gaps between hairlines would only flicker
    bars = [
        rect(i * step + gap, height - h, step - 2 * gap, h, css="bar")
        for i, h in enumerate(height * value / most for value in used)
    ]
    values = ", ".join(f"{value:.1f}" for value in used)
    title = f"{summary.method}, asked for {percent(summary.budget)}\nexperts per layer: {values}"
    target = rect(0, 0, width, height, css="target")
    foot = line(0, height, width, height, css="zero")
    return svg(
        width, height + 1, title, group("tip", *bars, foot, target, title=title), css="spark"
    )


def token_rows(summary: Summary, results: SweepResults) -> str:
    """Return for each layer how many tokens ran 0, 1, .. K experts; a diamond marks the mean."""
    labels = layer_labels(results)
    rows = _histograms(summary)
    most = max(len(row) for row in rows) - 1
    height = 14 if len(rows) > _MANY else 26
    left, top, width = 34, 34, 270
    step = width / (most + 1)
    tallest = max(max(row) for row in rows) or 1.0
    drawn = [
        text(left, 12, f"experts that ran →  (tallest bar: {100 * tallest:.0f} %)", css="axis")
    ]
    every = math.ceil(16 / step)
    for n in range(0, most + 1, every):
        drawn.append(text(left + (n + 0.5) * step, top - 6, n, css="tick", anchor="middle"))
    for index, row in enumerate(rows):
        base = top + (index + 1) * height
        drawn.append(text(left - 7, base - height / 2 + 5, labels[index], css="tick", anchor="end"))
        drawn.append(line(left, base, left + width, base, css="zero"))
        for n, fraction in enumerate(row):
            tip = f"{results.layers[index]}\n{percent(fraction)} of tokens ran {n} experts"
            tall = fraction / tallest * (height - 3)
            bar = rect(left + n * step + 1, base - tall, step - 2, tall, css="bar")
            target = rect(left + n * step, base - height, step, height, css="target")
            drawn.append(group("tip", bar, target, title=tip))
        mean = math.fsum(n * fraction for n, fraction in enumerate(row))
        drawn.append(marker("diamond", left + (mean + 0.5) * step, base, 3.2, css="mean"))
    about = (
        f"Experts per token with {summary.method}, asked for {percent(summary.budget)}: "
        "share of tokens by number of experts, one row per layer"
    )
    bottom = top + len(rows) * height + 8
    return svg(left + width + 4, bottom, about, *drawn, css="chart")


def token_histogram(summary: Summary, results: SweepResults) -> str:
    """Return how many experts ran, over all tokens and layers alike."""
    rows = _histograms(summary)
    most = max(len(row) for row in rows)
    padded = [[*row, *[0.0] * (most - len(row))] for row in rows]
    values = mean_rows(padded)
    left, width, top, bottom = 4.0, 228.0, 20.0, 124.0
    step = width / most
    y = linear(0, 1, bottom, top)
    drawn = [line(left, bottom, left + width, bottom, css="zero")]
    for n, value in enumerate(values):
        x = left + n * step
        bar = rect(x + 1.5, y(value), step - 3, bottom - y(value), css="bar")
        label = ""
        if value == max(values):
            middle = x + step / 2
            label = text(middle, y(value) - 4, f"{100 * value:.0f} %", css="value", anchor="middle")
        target = rect(x, top, step, bottom - top, css="target")
        tip = f"{percent(value)} of (token, layer) pairs ran {n} experts"
        drawn.append(group("tip", bar, label, target, title=tip))
        if n % math.ceil(14 / step) == 0:
            drawn.append(text(x + step / 2, bottom + 14, n, css="tick", anchor="middle"))
    about = f"Share of tokens and layers by experts that ran, {summary.method}"
    return svg(left + width + 4, bottom + 20, about, *drawn, css="chart")


def _histograms(summary: Summary) -> list[list[float]]:
    """Return per layer the fractions of tokens, mean over seeds."""
    by_layer = zip(*(cell.experts_per_token_histogram for cell in summary.cells), strict=True)
    return [mean_rows(rows) for rows in by_layer] or [[1.0]]


def _shades(values: Sequence[float]) -> _Shades:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return _Shades(finite)


class _Shades:
    """From a cost to one of the nine shades.

    Logarithmic where positive costs span more than a decade; then the lowest shade is three
    decades below the highest cost, or the lowest positive one.
    """

    def __init__(self, values: Sequence[float]) -> None:
        positive = [value for value in values if value > 0]
        self.low, self.high = min(values), max(values)
        self.logarithmic = self.high > 10 * min(positive, default=math.inf)
        if self.logarithmic:
            self.low = max(min(positive), self.high / 1000)

    def __call__(self, value: float) -> int:
        if not math.isfinite(value):
            return -1
        if self.high <= self.low:
            return 0
        if self.logarithmic:
            if value <= self.low:
                return 0
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(int(part * SHADES), SHADES - 1)


def _heat_cell(x: float, y: float, size: tuple[float, float], shade: int) -> str:
    css = f"q{shade}" if shade >= 0 else "unknown"
    return rect(x + 0.5, y + 0.5, size[0] - 1, size[1] - 1, css=css)


def _scale_strip(
    x: float, y: float, costs: Sequence[Sequence[float]], exponent: int, *, shown: bool
) -> str:
    finite = [v for row in costs for v in row if math.isfinite(v)] or [0.0]
    shades = _shades(finite)
    boxes = [rect(x + i * 16, y, 16, 9, css=f"q{i}") for i in range(SHADES)]
    at_most = "≤ " if shades.logarithmic else ""
    ends = (f"{at_most}{_compact(shades.low)}", _compact(shades.high))
    labels = [
        text(x, y + 24, ends[0], css="tick"),
        text(x + SHADES * 16, y + 24, ends[1], css="tick", anchor="end"),
    ]
    note = "log shades" if shades.logarithmic else "linear shades"
    if shown and exponent:
        note += f"; values {TIMES} 10{_superscript(exponent)}"
    labels.append(text(x + SHADES * 16 + 10, y + 9, note, css="tick faint"))
    return group("strip", *boxes, *labels)


def _exponent(values: Sequence[float]) -> int:
    """Return the power of ten, a multiple of three, that leaves at most three digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if largest else 0


def _compact(value: float) -> str:
    """Return a number in about three characters."""
    size = abs(value)
    if not math.isfinite(value):
        return "?"
    if size >= 99.5 or value == 0:
        return f"{value:.0f}"
    if size < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.1f}" if size >= 0.995 else f"{value:.2g}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
