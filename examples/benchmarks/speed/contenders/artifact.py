"""An artifact as a contender; see protocol.py. Run by peers.py.

Without a dial it runs as compiled, whatever the budget. ``--count`` has the experts that really
run counted, which is for a process of its own, as it may cost time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.session import open_session
from contenders import protocol

_CAPACITY = 1024  # columns at first; it grows
_EXPERTS, _EMBEDDINGS = {"MoE", "QMoE"}, {"Gather", "GatherBlockQuantized"}


class Artifact:
    """An artifact in onnxruntime."""

    def __init__(
        self,
        path: str,
        *,
        threads: int | None,
        count: bool,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._session = open_session(
            path, ep="cpu", threads=threads, count_activations=count, more_options=options
        )
        self._price: float | None = None
        self._budget = float(self._session.plan.budget.activations / self.trained)
        self._cache: Cache = self._session.empty_cache(1, capacity=_CAPACITY)
        self._ran, self._tokens, self._length = 0, 0, 0
        self.vocabulary = self._session.vocabulary or 256

    @property
    def trained(self) -> int:
        """Expert activations per token of the full model, over all layers."""
        return sum(layer.k_original for layer in self._session.plan.layers)

    def set_budget(self, budget: float) -> None:
        """Set the dial, if there is one."""
        if self._session.has_dial:
            self._price = price_of(self._session.plan, budget)
            self._budget = budget
            self._length = 0  # count anew

    def reset(self) -> None:
        """Empty the cache, which keeps its memory, as llama.cpp's does."""
        self._cache.truncate(0)

    def forward(self, ids: NDArray[np.int64]) -> None:
        """Run one call."""
        # Of the last token alone, as generation asks and as the other contenders do.
        output = self._session.run(
            ids[np.newaxis], cache=self._cache, price=self._price, logits_to_keep=1
        )
        if len(ids) != self._length:  # count calls of one kind, not what went before them
            self._ran, self._tokens, self._length = 0, 0, len(ids)
        self._ran += sum(output.activations or ())
        self._tokens += len(ids)

    def seconds(self, workload: str, measure: Callable[[], float]) -> float:
        """Return the time; there is nothing to choose."""
        return measure()

    def activations(self) -> float:
        """Return the experts that ran per token and layer, or those of the budget."""
        layers = len(self._session.plan.layers)
        if not self._ran:
            return self._budget * self.trained / layers
        return self._ran / self._tokens / layers

    def active_bytes(self) -> float:
        """Return the bytes of the budget's experts and of everything else but the embeddings."""
        experts, others = weight_bytes(self._session.files.graph)
        layers = self._session.plan.layers
        available = sum(layer.experts for layer in layers) / len(layers)
        return others + experts * self.activations() / available


def weight_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of all experts, and of all other weights that every token reads in full."""
    graph = onnx.load(path, load_external_data=False).graph
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    experts = others = 0
    for tensor in graph.initializer:
        operators = users.get(tensor.name, set())
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        size = lengths[0] if lengths else tensor.ByteSize()
        if operators & _EXPERTS:
            experts += size
        elif not operators <= _EMBEDDINGS:
            others += size
    return experts, others


def main() -> None:
    """Serve an artifact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--session", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    protocol.serve(
        lambda: Artifact(
            options.artifact,
            threads=options.threads,
            count=options.count,
            options=dict(entry.split("=", 1) for entry in options.session),
        ),
        f"alloc-moe, {Path(options.artifact).name}",
    )
