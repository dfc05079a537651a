"""What a plan keeps of each token's candidates, in the words of a step program."""

from __future__ import annotations

from alloc_moe.passes.experts.lower import Allocation
from alloc_moe.passes.experts.policies import SCORES
from alloc_moe.passes.step.parts import Keep, TokenMap

SIZES = "alloc_moe.sizes.{layer}"
"""The initializer of a layer's sizes, which the lowering adds."""
TOKEN_MAP = "alloc_moe.token_{part}.{layer}"
"""The initializers of what tokens multiply these by, which the lowering adds too."""
_WORDS = {"threshold": "weight", "price": "price", "top-p": "top-p", "ratio": "ratio"}


def keep_of(allocation: Allocation, layer: int, trained: int) -> Keep:
    """Return what a layer keeps of `trained` candidates in a decode step.

    A pool of one sequence has one token there, of which it keeps the k best.
    """
    policy = allocation.redistribution
    if policy in SCORES and trained > 1:
        return _scored(allocation, layer, trained)
    k = trained if policy in SCORES else int(allocation.experts_per_token[layer])
    if policy == "batch" and 1 < k < trained:
        return Keep("pool", k=k)
    return Keep("top", k=k)


def weights_of(allocation: Allocation, layer: int, trained: int) -> str:
    """Return ``renorm`` where the kept weights are scaled to the sum of all, else ``keep``."""
    if allocation.weights != "renorm":
        return "keep"
    dropped = allocation.redistribution in SCORES or (
        int(allocation.experts_per_token[layer]) < trained
    )
    return "renorm" if dropped and trained > 1 else "keep"


def _scored(allocation: Allocation, layer: int, trained: int) -> Keep:
    policy = allocation.redistribution
    priced = policy == "price"
    given = allocation.sizes[layer] if layer < len(allocation.sizes) else None
    quota = None
    if allocation.cap is not None:
        quota = min(trained, allocation.cap * allocation.experts_per_token[layer]) - 1
    return Keep(
        "score",
        score="overlap" if allocation.overlap else _WORDS[policy],
        sizes=SIZES.format(layer=layer) if given is not None and priced else None,
        twice_overlap=2 * allocation.overlap if allocation.overlap else None,
        threshold=float(allocation.thresholds[layer]),
        dial=priced and allocation.dial,
        quota=quota if quota is not None and quota < trained - 1 else None,
        token_sizes=_token_map(allocation, layer) if priced else None,
    )


def _token_map(allocation: Allocation, layer: int) -> TokenMap | None:
    given = allocation.token_factors
    factors = given[layer] if layer < len(given) else None
    if factors is None:
        return None
    matrix, bias = (TOKEN_MAP.format(part=part, layer=layer) for part in ("matrix", "bias"))
    return TokenMap(matrix, bias, factors.limit)
