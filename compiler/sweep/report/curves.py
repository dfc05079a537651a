"""Charts of added loss against the activations that were really made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alloc_moe.compiler.sweep.report.axes import Frame, axes, band, make_frame, route
from alloc_moe.compiler.sweep.report.data import Digest, Summary, bare, percent, signed
from alloc_moe.compiler.sweep.report.svg import (
    COLORS,
    DASHES,
    SHAPES,
    Style,
    group,
    line,
    marker,
    path,
    rect,
    shorten,
    spread,
    svg,
    symmetric_log,
    text,
    text_width,
)

_LABEL_SIZE = 13.0
_LABEL_LETTERS = 30


def method_styles(digest: Digest) -> dict[str, Style]:
    """Return how each method looks: the default stands out, plain top-k stands back."""
    styles: dict[str, Style] = {}
    others = 0
    for index, method in enumerate(digest.methods):
        if method == digest.subject:
            styles[method] = Style(f"m0 s{index} own", SHAPES[0], "")
        elif method == digest.baseline:
            styles[method] = Style(f"m1 s{index}", SHAPES[1], "2 3")
        else:
            place = others
            styles[method] = Style(
                f"m{2 + place % (COLORS - 2)} s{index}",
                SHAPES[2 + place % (len(SHAPES) - 2)],
                DASHES[(place + place // (COLORS - 2)) % len(DASHES)],
            )
            others += 1
    return styles


def loss_chart(digest: Digest, styles: Mapping[str, Style], *, width: int, names: bool) -> str:
    """Return every method's added loss against its measured activations.

    The full model is on the left at zero, fewer experts to the right. With `names` each line ends
    in its name, else in its rank, which the list of methods beside the chart repeats.
    """
    shown = [method for method in digest.methods if digest.row(method)]
    labels = {method: _label(digest, method, names=names) for method in shown}
    margin = 30 + max((text_width(label, _LABEL_SIZE) for label in labels.values()), default=0)
    height = 470 if names else 400
    frame = make_frame(digest, (58, width - margin, 22, height - 58), symmetric_log)
    ends = [frame.y(digest.row(method)[0].added.mean) for method in shown]
    places = spread(ends, gap=17, low=frame.top + 4, high=frame.bottom)
    drawn = [axes(frame, digest, *_captions(frame, wide=names), counts=True)]
    # The best is drawn last, over the others.
    for method, place in reversed(list(zip(shown, places, strict=True))):
        end = digest.row(method)[0]
        x, y = frame.x(end.activations.mean), frame.y(end.added.mean)
        leader = [(x + 7, y), (frame.right + 6, place), (frame.right + 12, place)]
        drawn.append(
            group(
                f"series {styles[method].css}",
                path(leader, css="leader"),
                _series(frame, digest, method, styles[method]),
                text(frame.right + 16, place + 4.5, labels[method], css="name"),
            )
        )
    drawn.append(_full_model(frame, digest))
    about = (
        "Added loss against measured activations per token, one line per method; "
        "the table of results holds the same numbers"
    )
    return svg(width, height, about, *drawn, css="chart wide" if names else "chart narrow")


def method_panels(digest: Digest, styles: Mapping[str, Style]) -> list[tuple[str, str]]:
    """Return for each method its own small chart, the others in grey behind; with its name."""
    panels = []
    for method in digest.methods:
        row = digest.row(method)
        if not row:
            continue
        frame = make_frame(digest, (52, 288, 16, 164), symmetric_log)
        ghosts = [
            path(route(frame, digest, other), css="ghost")
            for other in digest.methods
            if other != method and digest.row(other)
        ]
        values = _point_labels(frame, row)
        drawn = svg(
            300,
            186,
            f"Added loss of {method} against measured activations, the other methods in grey",
            axes(frame, digest, counts=False),
            *ghosts,
            group(
                f"series {styles[method].css}",
                _series(frame, digest, method, styles[method]),
                *values,
            ),
            css="chart",
        )
        panels.append((method, drawn))
    return panels


def describe(summary: Summary) -> str:
    """Return a result with all its digits, for a tooltip."""
    added, seeds = summary.added, len(summary.cells)
    lines = [
        f"{summary.method}, asked for {percent(summary.budget)}",
        f"added loss {added.mean:+.5f} nats per token",
        f"activations measured {summary.activations.mean:.2f}",
    ]
    if seeds > 1:
        lines[1] += f" ({added.low:+.5f} to {added.high:+.5f} over {seeds} seeds)"
    if summary.decode:
        lines.append(f"one token per call {summary.decode.mean:+.5f}")
    return "\n".join([*lines, summary.remark] if summary.remark else lines)


def _label(digest: Digest, method: str, *, names: bool) -> str:
    rank = str(digest.methods.index(method) + 1)
    return f"{rank}  {shorten(bare(method), _LABEL_LETTERS)}" if names else rank


def _captions(frame: Frame, *, wide: bool) -> tuple[str, str]:
    caption = "measured activations per token; fewer to the right →"
    if wide:
        caption = "measured activations per token (share of the full model, count); fewer →"
    middle = (frame.left + frame.right) / 2
    return (
        text(middle, frame.bottom + 52, caption, css="axis", anchor="middle"),
        text(4, 12, "added loss, nats per token", css="axis"),
    )


def _series(frame: Frame, digest: Digest, method: str, style: Style) -> str:
    row = digest.row(method)
    size = 5.0 if "own" in style.css else 4.2
    parts = [band(frame, row), path(route(frame, digest, method), css="curve", dash=style.dash)]
    for summary in row:
        x, y = frame.x(summary.activations.mean), frame.y(summary.added.mean)
        high, low = frame.y(summary.added.high), frame.y(summary.added.low)
        whisker = line(x, high, x, low, css="whisker")
        # A generous invisible target, as a marker is hard to hit with a finger.
        target = rect(x - 9, y - 9, 18, 18, css="target")
        mark = marker(style.shape, x, y, size)
        parts.append(group("tip", whisker, mark, target, title=describe(summary)))
    return "".join(parts)


def _point_labels(frame: Frame, row: Sequence[Summary]) -> list[str]:
    """Return the values beside a small chart's points, left out where they would touch."""
    drawn, last = [], frame.right + 100.0
    for summary in row:  # from the smallest budget, on the right, to the left
        value = signed(summary.added.mean)
        width = text_width(value, 11)
        # Above and to the left, as losses rise to the right.
        x = frame.x(summary.activations.mean) + 7
        y = frame.y(summary.added.mean) - 9
        if last - x < 4:
            continue
        drawn.append(text(x, max(y, frame.top + 2), value, css="value", anchor="end"))
        last = x - width
    return drawn


def _full_model(frame: Frame, digest: Digest) -> str:
    full = digest.results.full_activations
    x, y = frame.x(full), frame.y(0.0)
    title = f"full model: loss {digest.results.full_loss:.5f}, {full} activations per token"
    return group("full tip", marker("circle", x, y, 5.5, css="ring"), title=title)
