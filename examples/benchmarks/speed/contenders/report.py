"""What timings in turns say, as a table and as sentences."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Key = tuple[str, float]  # a contender and its budget
Runs = dict[Key, list[float]]


@dataclass(frozen=True)
class Results:
    """What was measured.

    ``speeds`` are tokens per second by workload, contender and round; ``bandwidth`` is bytes per
    second by round; ``activations`` are experts run per token and layer, by workload, and
    ``active_bytes`` the bytes of weights that a decoded token reads. ``trained`` are the full
    model's experts per token and layer.
    """

    trained: float
    speeds: dict[str, Runs] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)
    activations: dict[str, dict[Key, float]] = field(default_factory=dict)
    active_bytes: dict[Key, float] = field(default_factory=dict)

    def k(self, budget: float) -> str:
        """Return a budget as experts per token and layer."""
        return f"k={budget * self.trained:.3g}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and the least and the greatest in brackets."""
    least, greatest = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({least:.{digits}f}-{greatest:.{digits}f})"


def table(results: Results) -> Iterator[str]:
    """Yield a Markdown table: tokens per second, and experts run, of every contender."""
    workloads = list(results.speeds)
    yield "| tokens/s: median (min-max) | " + " | ".join(workloads) + " |"
    yield "|---|" + "---|" * len(workloads)
    for name, budget in results.speeds[workloads[0]]:
        cells = []
        for workload in workloads:
            ran = results.activations[workload][name, budget]
            speeds = spread(results.speeds[workload][name, budget], 1)
            cells.append(f"{speeds}, {ran:.2f} experts")
        yield f"| {name}, {results.k(budget)} | " + " | ".join(cells) + " |"


def claims(results: Results, ours: str) -> Iterator[str]:
    """Yield what the timings say about the contender ``ours``, a sentence each."""
    rounds = f"median of {len(results.bandwidth)} rounds"
    for workload, runs in results.speeds.items():
        for (name, budget), mine in runs.items():
            if name != ours:
                continue
            what = f"{workload} at {results.k(budget)}"
            for (peer, same), theirs in runs.items():
                if peer != ours and same == budget:
                    middle, ends = _ratio(mine, theirs)
                    yield f"{what}: {middle}x {peer}'s tokens/s ({rounds}, {ends})"
            if budget != 1.0 and (full := runs.get((ours, 1.0))):
                middle, ends = _ratio(full, mine)
                time = f"{middle} of the time at {results.k(1.0)}"
                yield f"{what}: {time} ({rounds}, {ends})"


def limits(results: Results) -> Iterator[str]:
    """Yield what share of the memory's bandwidth each contender's decode uses."""
    yield f"Streaming read bandwidth: {spread([v / 1e9 for v in results.bandwidth], 1)} GB/s"
    for workload, runs in results.speeds.items():
        if not workload.startswith("decode"):
            continue
        for (name, budget), speeds in runs.items():
            size = results.active_bytes[name, budget]
            shares = [
                size * speed / limit for speed, limit in zip(speeds, results.bandwidth, strict=True)
            ]
            yield (
                f"{workload} at {results.k(budget)}, {name}: {size / 1e9:.3f} GB of weights per "
                f"token, {size * statistics.median(speeds) / 1e9:.1f} GB/s, "
                f"{spread(shares)} of the bandwidth"
            )


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> tuple[str, str]:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    middle, _, ends = spread(ratios).partition(" ")
    return middle, ends.strip("()")
