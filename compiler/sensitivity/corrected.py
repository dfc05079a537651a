"""What a layer gives at a mean of k experts while its sensitivity is measured, corrected or not.

The correction of layer l at k is the one that `fit_corrections` would fit if that layer alone had k
experts and all others all of theirs: what enters the layer is then the full model's, so one pass
over the calibration tokens fits every layer at every k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.correction.sums import CorrectionSums
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.records import Correction, CorrectionMode, Metric, Redistribution
from alloc_moe.compiler.reference.experts import correct, replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import rank_candidates
from alloc_moe.compiler.rounding.weights import rounded_experts
from alloc_moe.compiler.sensitivity.kept import Keep, make_keep
from alloc_moe.compiler.workspace.processes import Processes

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

_TINY = 1e-30  # keeps 0 / 0 out where hidden states are all zero


def measured_correction(
    metric: Metric, redistribution: Redistribution, correction: CorrectionMode
) -> CorrectionMode:
    """Return the correction that a profile is measured with.

    ``price`` needs expert sizes, which no correction changes, and ``data-free`` has no text to fit
    one on: both are measured without.
    """
    return "none" if metric == "data-free" or redistribution == "price" else correction


@dataclass(frozen=True)
class Reduced:
    """Layers that run some of their candidates.

    ``corrections[l][k - 1]`` is what MoE layer l at k is corrected by, for k < K; None for no
    correction anywhere.
    """

    keep: Keep
    corrections: Sequence[Sequence[Correction]] | None = None

    def outputs(
        self, layer: int, k: int, pairs: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the layer's outputs [T, H] at k.

        Args:
            layer: The index of the MoE layer.
            k: The mean number of experts.
            pairs: The weighted outputs of all candidates [T, K, H], T being whole windows.
            weights: Their weights [T, K], ranked.
            ids: Their experts [T, K].
        """
        mask = self.keep(layer, k, weights, ids).to(pairs.dtype)
        outputs = torch.einsum("tj,tjh->th", mask, pairs)
        if self.corrections is None or k == weights.shape[1]:
            return outputs
        return correct(self.corrections[layer][k - 1], outputs, ids, weights * mask)


def make_reduced(
    moe_model: MoeModel,
    batches: Sequence[torch.Tensor],
    redistribution: Redistribution,
    correction: CorrectionMode,
    processes: Processes,
) -> Reduced:
    """Return the layers at k, under a measured redistribution and correction.

    Args:
        moe_model: The model.
        batches: This process's calibration windows, as [windows, sequence].
        redistribution: One that `measured_redistribution` returns.
        correction: One that `measured_correction` returns.
        processes: Those that have the other windows.
    """
    keep = make_keep(moe_model, batches, redistribution, processes)
    if correction == "none":
        return Reduced(keep)
    return Reduced(keep, fit_every_k(moe_model, batches, Reduced(keep), correction, processes))


def all_pairs(
    experts: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted outputs of all candidates [T, K, H] for `hidden` [T, H]."""
    rows = hidden.repeat_interleave(ids.shape[1], 0)
    return run_pairs(experts, rows, ids.flatten(), weights.flatten()).view(*ids.shape, -1)


@dataclass
class _Seen:
    """What the experts of one layer are given and give."""

    rounded: Callable[[], AbstractContextManager[None]] | None  # in which pairs are computed
    pairs: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T, K, H]
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T, K]
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [T, K]


def fit_every_k(
    moe_model: MoeModel,
    batches: Sequence[torch.Tensor],
    reduced: Reduced,
    mode: CorrectionMode,
    processes: Processes,
    formats: Sequence[BlockFormat] | None = None,
) -> list[list[Correction]]:
    """Return the correction of each layer at each k < K.

    With ``formats``, one per layer, it is that of a layer with rounded weights, towards what these
    give at K: as for a plan, no correction makes up for the rounding.
    """
    per_expert = mode == "affine"
    sums = [
        [CorrectionSums(layer.num_experts * per_expert) for _ in range(1, layer.experts_per_token)]
        for layer in moe_model.layers
    ]
    stack = DecoderStack(moe_model.model, moe_model.layers[0])
    with torch.no_grad():
        states: list[torch.Tensor | None] = [None] * len(batches)
        at = 0
        for index, layer in enumerate(moe_model.layers):
            inputs = zip(batches, states, strict=True)
            states = list(stack.stream(inputs, start=at, stop=layer.decoder_layer))
            at = layer.decoder_layer + 1
            with stack.resident(layer.decoder_layer):
                rounded = None
                if formats is not None:
                    given = (moe_model, layer.experts_name, formats[index])
                    rounded = functools.partial(rounded_experts, *given)
                for batch, ids in enumerate(batches):
                    seen = _Seen(rounded)
                    calls = {layer.experts_name: functools.partial(_watch, seen)}
                    with replaced_experts(moe_model.model, calls):
                        hidden = stack.run(ids, states[batch], start=at - 1, stop=at)
                    _add(sums[index], reduced, index, seen, hidden.flatten(0, 1))
                    states[batch] = hidden
    for row in sums:
        for each in row:
            each.reduce(processes)
    return [[each.affine() if per_expert else each.gain() for each in row] for row in sums]


def _watch(
    seen: _Seen,
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    seen.weights, seen.ids = rank_candidates(weights, ids)
    seen.pairs = full = all_pairs(experts, hidden, seen.ids, seen.weights)
    if seen.rounded is not None:
        with seen.rounded():
            seen.pairs = all_pairs(experts, hidden, seen.ids, seen.weights)
    return full.sum(1)


def _add(
    sums: Sequence[CorrectionSums], reduced: Reduced, layer: int, seen: _Seen, states: torch.Tensor
) -> None:
    """Add tokens to the sums of every k; `states` [T, H] are what leaves the decoder layer."""
    full = seen.pairs.sum(1)
    importance = 1 / states.square().mean(1).clamp(min=_TINY)  # as for a plan's corrections
    for k, sums_k in enumerate(sums, start=1):
        outputs = reduced.outputs(layer, k, seen.pairs, seen.weights, seen.ids)
        kept = seen.weights * reduced.keep(layer, k, seen.weights, seen.ids)
        sums_k.add(outputs, seen.ids, kept, full - outputs, importance)
