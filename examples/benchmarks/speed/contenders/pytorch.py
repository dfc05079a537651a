"""An OLMoE of random weights in transformers on PyTorch as a contender; see protocol.py.

For every workload the experts implementation that is fastest there at first is kept; batched_mm
never runs prompts, as it copies the experts of every token: 13 GB for 128 tokens. Where memory
doesn't hold all layers (float32), ``--layers`` takes fewer: every timing is then made twice, with
all and with half of those, and extended to the whole model in a straight line.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from random_models.olmoe import random_model
from random_models.shapes import SHAPES, Shape
from transformers import DynamicCache

from contenders import protocol

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_FOR_PROMPTS = "grouped_mm"


class Transformers:
    """A model in PyTorch."""

    def __init__(
        self, shape: Shape, *, layers: int, dtype: torch.dtype, implementations: tuple[str, ...]
    ) -> None:
        self._shape = shape
        self._layers = layers
        self._implementations = implementations
        self._model = random_model(shape, layers=layers, dtype=dtype)
        self._model.set_experts_implementation(_FOR_PROMPTS)
        self._best: dict[str, str] = {}
        self._decoding = self._running = _FOR_PROMPTS
        self._cache: DynamicCache | None = None
        self._used = shape.experts_per_token
        self.vocabulary = shape.vocabulary

    def set_budget(self, budget: float) -> None:
        """Have every router choose fewer experts, rounded to whole ones."""
        self._used = max(1, round(budget * self._shape.experts_per_token))
        for layer in self._model.model.layers:
            layer.mlp.gate.top_k = self._used

    def reset(self) -> None:
        """Drop the cache."""
        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def forward(self, ids: NDArray[np.int64]) -> None:
        """Run one call for the last token's logits."""
        name = self._decoding
        if len(ids) > 1 and name == "batched_mm":
            name = _FOR_PROMPTS
        if name != self._running:
            self._model.set_experts_implementation(name)
            self._running = name
        self._model(
            input_ids=torch.from_numpy(ids)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def seconds(self, workload: str, measure: Callable[[], float]) -> float:
        """Return the time with the experts implementation that is best for the workload."""
        if workload not in self._best:
            prompt = workload.startswith("prefill")
            names = [n for n in self._implementations if not (prompt and n == "batched_mm")]
            times = dict.fromkeys(names, math.inf)
            for name in names * 2:
                times[name] = min(times[name], self._measure(name, measure))
            self._best[workload] = min(times, key=times.__getitem__)
            print(f"transformers, {workload}: {times}", file=sys.stderr)
        return self._measure(self._best[workload], measure)

    def activations(self) -> float:
        """Return the experts used per token and layer."""
        return self._used

    def active_bytes(self) -> float:
        """Return the bytes of the experts used and of everything else but the embeddings."""
        experts = others = 0.0
        for name, value in self._model.named_parameters():
            if ".experts." in name:
                experts += value.nbytes * self._used / self._shape.experts
            elif "embed_tokens" not in name and "lm_head" not in name:
                others += value.nbytes
        scale = self._shape.layers / self._layers
        return (experts + others) * scale + float(self._model.lm_head.weight.nbytes)

    def _measure(self, implementation: str, measure: Callable[[], float]) -> float:
        self._decoding = implementation
        whole = measure()
        missing = self._shape.layers - self._layers
        if not missing:
            return whole
        fewer = self._layers // 2
        self._model.config.num_hidden_layers = fewer
        try:
            half = measure()
        finally:
            self._model.config.num_hidden_layers = self._layers
        return whole + missing * (whole - half) / (self._layers - fewer)


def main() -> None:
    """Serve a random model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=list(SHAPES), default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="Fewer layers, extended to the whole model.")
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layers = options.layers or shape.layers
    torch.set_num_threads(options.threads)
    extended = f", extended from {layers} layers" if layers < shape.layers else ""
    protocol.serve(
        lambda: Transformers(
            shape,
            layers=layers,
            dtype=getattr(torch, options.dtype),
            implementations=tuple(options.implementations),
        ),
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{options.dtype}{extended}",
    )
