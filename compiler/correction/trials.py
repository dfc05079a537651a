"""The plan's losses under different corrections, each run from the first layer that differs.

Trying every layer without its correction takes half the time that so many whole passes take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.losses import next_token_losses

if TYPE_CHECKING:
    from alloc_moe.compiler.model.moe_model import MoeModel
    from alloc_moe.compiler.records import Correction, Redistribution, Weights
    from alloc_moe.compiler.reference.policies import LayerParameters


@dataclass(frozen=True)
class Running:
    """How the plan runs: what it gives each layer, how that is shared out, which weights count."""

    parameters: Sequence[LayerParameters]
    redistribution: Redistribution
    weights: Weights


class CorrectionTrials:
    """Runs a plan with corrections on a text.

    Args:
        moe: The model.
        ids: The text [windows, sequence].
        running: The plan.
        tokens_per_batch: How many tokens run at a time.
    """

    def __init__(
        self, moe: MoeModel, ids: torch.Tensor, running: Running, *, tokens_per_batch: int
    ) -> None:
        self._moe = moe
        self._ids = ids
        self._running = running
        self._batches = torch.split(ids, max(1, tokens_per_batch // ids.shape[1]))
        self._stack = DecoderStack(moe.model, moe.layers[0])
        self._entering: dict[int, list[torch.Tensor]] = {}  # where nothing is kept in files

    def losses(
        self, corrections: Sequence[Correction | None], *, start: int = 0, keep: bool = False
    ) -> torch.Tensor:
        """Return the next-token losses [tokens].

        Args:
            corrections: One per MoE layer.
            start: The MoE layer to begin at; 0 begins at the embeddings. Those before it must be
                corrected as in the last run with `keep`.
            keep: Whether to keep what enters each MoE layer, for later runs to begin at.
        """
        inputs = ("losses", self._moe.fingerprint, self._ids, self._running, list(corrections))
        run = lambda: [self._losses(corrections, start, keep)]  # noqa: E731
        return self._moe.results.recall(inputs, run)[0]

    def _losses(
        self, corrections: Sequence[Correction | None], start: int, keep: bool
    ) -> torch.Tensor:
        states: Sequence[torch.Tensor | None] = [None] * len(self._batches)
        at = 0
        if start and (found := self._recall(corrections, start)) is not None:
            at = self._moe.layers[start].decoder_layer
            states = found
        with allocated(
            self._moe.model,
            self._moe.layers,
            self._running.parameters,
            redistribution=self._running.redistribution,
            weights=self._running.weights,
            corrections=corrections,
        ):
            if keep:
                for index, layer in enumerate(self._moe.layers[1:], start=1):
                    states = self._run(states, at, layer.decoder_layer)
                    at = layer.decoder_layer
                    self._keep(corrections, index, states)
            ends = self._run(states, at, len(self._stack))
            pairs = zip(self._batches, ends, strict=True)
            parts = [next_token_losses(self._stack.head, self._moe, ids, end) for ids, end in pairs]
        return torch.cat(parts)

    def _run(
        self, states: Sequence[torch.Tensor | None], start: int, stop: int
    ) -> list[torch.Tensor]:
        pairs = zip(self._batches, states, strict=True)
        return list(self._stack.stream(pairs, start=start, stop=stop))

    def _inputs(self, corrections: Sequence[Correction | None], layer: int) -> Sequence[object]:
        given = (self._moe.fingerprint, self._ids, self._running)
        return ("entering", *given, list(corrections[:layer]), layer)

    def _keep(
        self, corrections: Sequence[Correction | None], layer: int, states: list[torch.Tensor]
    ) -> None:
        if self._moe.results.keeps:
            self._moe.results.keep(self._inputs(corrections, layer), states)
        else:
            self._entering[layer] = states

    def _recall(
        self, corrections: Sequence[Correction | None], layer: int
    ) -> list[torch.Tensor] | None:
        """Return what was kept; None if its file is damaged, after a kill."""
        if self._moe.results.keeps:
            return self._moe.results.find(self._inputs(corrections, layer))
        return self._entering[layer]
