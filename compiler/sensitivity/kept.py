"""Which candidates of a layer run at a mean of k while its sensitivity is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import DecoderStack
from alloc_moe.compiler.records import SCORED, Redistribution
from alloc_moe.compiler.reference.experts import library_experts, replaced_experts
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.compiler.workspace.processes import Processes

Keep = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""``keep(layer, k, weights [T, K], ids [T, K]) -> mask [T, K]``, candidates ranked by weight.

T tokens are whole calibration windows.
"""


def measured_redistribution(redistribution: Redistribution) -> Redistribution:
    """Return the policy that a profile for `redistribution` is measured under.

    A calibration window is a call of its own, so ``batch`` is ``sequence``. ``price`` needs expert
    sizes, which no policy changes; costs per layer, which it doesn't need, are then those of
    ``none``.
    """
    return {"batch": "sequence", "price": "none"}.get(redistribution, redistribution)  # type: ignore[return-value]


def make_keep(
    moe_model: MoeModel,
    batches: Sequence[torch.Tensor],
    redistribution: Redistribution,
    processes: Processes,
) -> Keep:
    """Return the rule that keeps k candidates in the mean, under a measured redistribution.

    For the policies that compare scores with a threshold the full model runs once: the threshold
    for k is the score that, of all calibration tokens' scores in that layer, leaves a mean of k.

    Args:
        moe_model: The model.
        batches: This process's calibration windows, as [windows, sequence].
        redistribution: One that `measured_redistribution` returns.
        processes: Those that have the other windows.
    """
    found = None
    if redistribution in SCORED:
        found = _find_scores(moe_model, batches, redistribution, processes)
    return functools.partial(_keep, redistribution, batches[0].shape[1], found)


def _keep(
    redistribution: Redistribution,
    sequence_length: int,
    falling_scores: Sequence[torch.Tensor] | None,
    layer: int,
    k: int,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    if k == weights.shape[1]:
        return torch.ones_like(weights, dtype=torch.bool)
    windows = (len(weights) // sequence_length, sequence_length)
    real = torch.ones(windows, dtype=torch.bool, device=weights.device)
    if falling_scores is None:
        return keep_mask(redistribution, weights, ids, real, LayerParameters(k))
    tokens = falling_scores[layer].numel() // (weights.shape[1] - 1)
    last = (k - 1) * tokens - 1
    threshold = falling_scores[layer][last].item() if k > 1 else float("inf")
    return keep_mask(redistribution, weights, ids, real, LayerParameters(k, threshold))


def _find_scores(
    moe_model: MoeModel,
    batches: Sequence[torch.Tensor],
    redistribution: Redistribution,
    processes: Processes,
) -> list[torch.Tensor]:
    """Return the scores of each layer's second and later candidates in falling order."""
    found: list[list[torch.Tensor]] = [[] for _ in moe_model.layers]

    def watch(
        index: int,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        ranked, ranked_ids = rank_candidates(weights, ids)
        found[index].append(scores(redistribution, ranked, ranked_ids)[:, 1:].flatten())
        return library_experts(experts, hidden, ids, weights)

    calls = {
        layer.experts_name: functools.partial(watch, index)
        for index, layer in enumerate(moe_model.layers)
    }
    stack = DecoderStack(moe_model.model, moe_model.layers[0])
    with torch.no_grad(), replaced_experts(moe_model.model, calls):
        for _ in stack.stream((ids, None) for ids in batches):
            pass  # what is wanted was watched
    gathered = [processes.gather(torch.cat(parts)) for parts in found]
    return [values.sort(descending=True).values for values in gathered]
