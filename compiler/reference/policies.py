"""Which of the router's candidates run under a plan, in PyTorch.

The policies of the graph passes must decide the same. Some share a layer's k activations among
tokens: ``none``, ``batch``, ``sequence``. The others compare each candidate's score with a
threshold, so that no token depends on another: ``threshold``, ``price``, ``top-p``, ``ratio``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from alloc_moe.compiler.records import SCORED, Redistribution, Weights
from alloc_moe.compiler.reference.scores import TINY, scores, sizes_of, sums_after
from alloc_moe.runtime.artifact.plan import AllocationPlan, PlannedLayer
from alloc_moe.runtime.artifact.token_sizes import TokenSizes
from alloc_moe.runtime.errors import ArtifactError


@dataclass(frozen=True)
class LayerParameters:
    """What a policy may know of its layer.

    ``k`` is the mean number of experts per real token. The policies in `SCORED` keep scores of
    ``threshold`` or more, whatever ``k`` is; ``sizes[e]`` multiplies the weights of expert e under
    ``price``, or ``sizes[t, e]`` those of token t once `for_tokens` made them of ``token_sizes``;
    ``overlap`` is what `scores` says. ``cap`` limits each call to that multiple of ``k``. A
    threshold that is known only when the model runs is a tensor without dimensions.
    """

    k: float
    threshold: float | torch.Tensor = 0.0
    sizes: torch.Tensor | tuple[float, ...] | None = None
    cap: float | None = None
    overlap: float = 0.0
    token_sizes: TokenSizes | None = None

    def quota(self, candidates: int) -> float:
        """Return how many experts besides the first a capped call may run per real token."""
        return math.inf if self.cap is None else min(candidates, self.cap * self.k) - 1


class Kept(NamedTuple):
    """Which candidates run, and by how much each of these decisions was taken.

    ``gaps`` are the least changes of router weights that could turn them; infinite where nothing
    was decided. Two computations whose rounding differs by more may decide otherwise. As tensors
    they cost nothing where a policy is traced for its mask.
    """

    mask: torch.Tensor  # [tokens, candidates] bool
    gaps: torch.Tensor  # [tokens, candidates] float32

    @property
    def margin(self) -> float:
        """The least of the gaps; infinite if there are none."""
        return self.gaps.min().item() if self.gaps.numel() else math.inf


Policy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LayerParameters], Kept]
"""``policy(weights [T, K], ids [T, K], real [B, S], parameters)``, candidates ranked, T = B * S."""


def layer_parameters(plan: AllocationPlan, price: float | None = None) -> list[LayerParameters]:
    """Return what a plan gives each of its layers.

    Args:
        plan: Any plan.
        price: For plans with the redistribution ``price``: used instead of the plan's own.

    Raises:
        ArtifactError: The plan lacks what its redistribution needs.
    """
    if plan.redistribution not in SCORED:
        for layer in plan.layers:
            if layer.k != int(layer.k):
                raise ArtifactError(
                    f"The plan redistributes by {plan.redistribution}, which needs whole numbers "
                    f"of experts, but gives {layer.name} {layer.k:g}. Compile again."
                )
        return [LayerParameters(layer.k) for layer in plan.layers]
    if plan.redistribution == "price":
        price = plan.price if price is None else price
        if price is None:
            raise ArtifactError("The plan redistributes by price but lacks it. Compile again.")
    return [
        LayerParameters(
            layer.k,
            _threshold(plan, layer, price),
            layer.sizes,
            plan.cap,
            plan.overlap or 0.0,
            layer.token_sizes,
        )
        for layer in plan.layers
    ]


def _threshold(plan: AllocationPlan, layer: PlannedLayer, price: float | None) -> float:
    by_price = plan.redistribution == "price"
    threshold = price if by_price else layer.threshold
    lacking = "threshold" if threshold is None else "sizes"
    if threshold is None or (by_price and len(layer.sizes or ()) != layer.experts):
        raise ArtifactError(
            f"The plan redistributes by {plan.redistribution} but lacks the {lacking!r} of "
            f"{layer.name}. Compile again."
        )
    return threshold


def rank_candidates(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids [tokens, candidates] by falling weight; equal ones keep their order.

    Some routers, DeepSeek's among them, return their candidates unsorted.
    """
    ranked, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    return ranked, ids.gather(-1, order)


def keep_mask(
    redistribution: Redistribution,
    weights: torch.Tensor,
    ids: torch.Tensor,
    real: torch.Tensor,
    parameters: LayerParameters,
) -> torch.Tensor:
    """Return which candidates run.

    Args:
        redistribution: How the layer's activations are shared out.
        weights: Router weights [tokens, candidates], ranked by `rank_candidates`.
        ids: The candidates' experts [tokens, candidates].
        real: [batch, sequence] bool, False at padding; tokens are the batch's rows in a row.
        parameters: What the plan gives the layer.

    Returns:
        [tokens, candidates] bool, none of a pad: exactly ``k`` per real token in the mean, or under
        the policies in `SCORED` the first and all that reach the threshold.
    """
    return POLICIES[redistribution](weights, ids, real, parameters).mask


def _none(
    weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor, parameters: LayerParameters
) -> Kept:
    """Each token its first k."""
    k = int(parameters.k)
    ranks = torch.arange(weights.shape[1], device=weights.device)
    tokens = real.reshape(-1, 1)
    return Kept(tokens & (ranks < k), _leads(weights, tokens & (ranks[1:] == k)))


def _batch(
    weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor, parameters: LayerParameters
) -> Kept:
    """All real tokens of the call share one pool."""
    return _share(weights, ids, real, parameters, pools=1)


def _sequence(
    weights: torch.Tensor, ids: torch.Tensor, real: torch.Tensor, parameters: LayerParameters
) -> Kept:
    """Each row of the batch is a pool, so that no request depends on its batch mates."""
    return _share(weights, ids, real, parameters, pools=real.shape[0])


def _share(
    weights: torch.Tensor,
    ids: torch.Tensor,
    real: torch.Tensor,
    parameters: LayerParameters,
    *,
    pools: int,
) -> Kept:
    """Rank 1 always runs; the largest other weights of each pool win what is left."""
    tokens, candidates = weights.shape
    k = int(parameters.k)
    if k in (1, candidates):  # nothing to share
        return _none(weights, ids, real, parameters)
    size = tokens // max(pools, 1) * (candidates - 1)
    competes = real.reshape(-1, 1).expand(-1, candidates - 1).reshape(pools, size)
    winners = (k - 1) * real.reshape(pools, -1).sum(1, keepdim=True)  # [pools, 1]
    wins, gaps = _largest(weights[:, 1:].reshape(pools, size), competes, winners)
    others = wins.reshape(tokens, candidates - 1)

    alone = real.reshape(-1, 1) & ~others[:, :1]  # here it matters which candidate ranks first
    leads = _leads(weights, torch.cat([alone, torch.zeros_like(others[:, 1:])], dim=1))
    gaps = torch.minimum(_after_first(gaps.reshape(others.shape)), leads)
    return Kept(torch.cat([real.reshape(-1, 1), others], dim=1), gaps)


def _largest(contest: torch.Tensor, competes: torch.Tensor, winners: torch.Tensor) -> Kept:
    """The `winners` [pools, 1] largest of each row that compete, and by how much all won or lost.

    Of equal ones the earlier token's wins, and within a token the better ranked.
    """
    contest = contest.masked_fill(~competes, -math.inf)
    falling, order = torch.sort(contest, dim=1, descending=True, stable=True)
    wins = (torch.arange(contest.shape[1], device=contest.device) < winners) & falling.isfinite()
    ends = contest.new_full((len(contest), 1), math.inf)
    worst = torch.cat([falling.masked_fill(~wins, math.inf), ends], dim=1).amin(1, keepdim=True)
    best = torch.cat([falling.masked_fill(wins, -math.inf), -ends], dim=1).amax(1, keepdim=True)
    mask = torch.zeros_like(wins).scatter(1, order, wins)
    return Kept(mask, torch.where(mask, contest - best, worst - contest).detach().float())


def _by_score(
    weights: torch.Tensor,
    ids: torch.Tensor,
    real: torch.Tensor,
    parameters: LayerParameters,
    *,
    redistribution: Redistribution,
) -> Kept:
    """Rank 1 always runs, others if their score reaches the threshold and the cap has room."""
    score = scores(redistribution, weights, ids, parameters.sizes, parameters.overlap)
    threshold = torch.as_tensor(parameters.threshold, dtype=torch.float32, device=score.device)
    reached = (score >= threshold) & real.reshape(-1, 1)
    distance = (score - threshold).abs() / _slopes(redistribution, weights, ids, parameters)
    decided = real.reshape(-1, 1).expand_as(score)
    if redistribution != "top-p":  # its scores are the only ones that can be below 0
        decided = decided & (threshold > 0)
    others, gaps = reached[:, 1:], _known(distance[:, 1:], decided[:, 1:])
    quota = parameters.quota(weights.shape[1])
    if quota < weights.shape[1] - 1:
        room = (real.sum(dtype=torch.float64) * quota).floor().reshape(1, 1)
        competing = others.reshape(1, -1)
        wins, cut = _largest(score[:, 1:].reshape(1, -1), competing, room)
        others, gaps = wins.reshape(others.shape), torch.minimum(gaps, cut.reshape(gaps.shape))
    mask = torch.cat([real.reshape(-1, 1), others], dim=1)
    return Kept(mask, torch.minimum(_after_first(gaps), _rank_gaps(weights, mask, reached)))


def _slopes(
    redistribution: Redistribution,
    weights: torch.Tensor,
    ids: torch.Tensor,
    parameters: LayerParameters,
) -> torch.Tensor:
    """By how much a score changes at most with the weights it is made of [tokens, candidates]."""
    ones = torch.ones_like(weights, dtype=torch.float32)
    match redistribution:
        case "price":
            sizes, overlap = sizes_of(parameters.sizes, ids), parameters.overlap
            if overlap == 0:
                return sizes
            added = sizes * weights
            score = scores("price", weights, ids, parameters.sizes, overlap)
            # Its own weight's part and that of the weights after it.
            own = sizes * (added + overlap * sums_after(added))
            return (own + overlap * added * sums_after(sizes)) / score.clamp(min=TINY)
        case "ratio":
            return ones / weights[:, :1].clamp(min=TINY)
    return ones


def _rank_gaps(weights: torch.Tensor, mask: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """The leads of candidates that run over the next that don't.

    Where the first doesn't reach the threshold itself, it runs for its rank alone.
    """
    last = mask[:, :-1] & ~mask[:, 1:]
    first = last[:, :1] | (mask[:, :1] & ~reached[:, :1])[:, : last.shape[1]]
    return _leads(weights, torch.cat([first, last[:, 1:]], dim=1))


def _leads(weights: torch.Tensor, matters: torch.Tensor) -> torch.Tensor:
    """Each lead over the next candidate that matters [T, K - 1], at both of them [T, K]."""
    leads = _known(weights[:, :-1] - weights[:, 1:], matters)
    return torch.minimum(_after_first(leads), _after_first(leads.flip(1)).flip(1))


def _known(gaps: torch.Tensor, matters: torch.Tensor) -> torch.Tensor:
    """The gaps that matter; the others are infinite."""
    return gaps.detach().float().masked_fill(~matters, math.inf)


def _after_first(gaps: torch.Tensor) -> torch.Tensor:
    """The gaps [T, K] of the first candidate, which has none, and of the others [T, K - 1]."""
    return torch.cat([gaps.new_full((len(gaps), 1), math.inf), gaps], dim=1)


def adjust_weights(mode: Weights, weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the weights [tokens, candidates] that combine the experts, zero where dropped.

    ``keep`` leaves them as the router gave them; ``renorm`` gives the kept ones the sum of all.
    """
    kept = weights.masked_fill(~keep, 0)
    if mode == "keep":
        return kept
    share = kept.sum(-1, keepdim=True)
    return kept * torch.where(share > 0, weights.sum(-1, keepdim=True) / share, 1)


POLICIES: Mapping[Redistribution, Policy] = {
    "none": _none,
    "batch": _batch,
    "sequence": _sequence,
    **{name: functools.partial(_by_score, redistribution=name) for name in SCORED},
}
