"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

_HELP = {
    "requests_total": ("counter", "Requests by the HTTP status they were answered with."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were computed."),
    "generated_tokens_total": ("counter", "Tokens that were chosen."),
    "executed_experts_total": ("counter", "Experts executed, summed over tokens and layers."),
    "counted_tokens_total": ("counter", "Tokens that they were executed for: over them, the mean."),
    "steps_total": ("counter", "Calls of the model that gave each sequence of a batch a token."),
    "step_rows_total": ("counter", "Sequences in those calls: over steps, the mean batch."),
    "cancelled_total": ("counter", "Sequences whose client hung up, or whose time was up."),
    "running": ("gauge", "Sequences that are being decoded."),
    "waiting": ("gauge", "Sequences in the queue."),
}
_PREFIX = "alloc_moe_"


class Metrics:
    """Counters that any thread may add to, and gauges that are asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._gauges: dict[str, Callable[[], int]] = {}

    def add(self, name: str, count: int = 1, *, label: str = "") -> None:
        """Count; a ``label`` is such as ``status="200"``."""
        assert _HELP[name][0] == "counter"
        with self._lock:
            self._counts[name, label] += count

    def watch(self, gauges: Mapping[str, Callable[[], int]]) -> None:
        """Have gauges that are asked whenever somebody looks."""
        self._gauges |= gauges

    def text(self) -> str:
        """Return all of them."""
        with self._lock:
            counts = dict(self._counts)
        lines = []
        for name, (kind, meaning) in _HELP.items():
            full = f"{_PREFIX}{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
            if kind == "gauge":
                lines.append(f"{full} {self._gauges[name]() if name in self._gauges else 0}")
                continue
            found = {label: value for (key, label), value in counts.items() if key == name}
            for label, value in sorted((found or {"": 0}).items()):
                lines.append(f"{full}{{{label}}} {value}" if label else f"{full} {value}")
        return "\n".join(lines) + "\n"
