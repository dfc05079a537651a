"""Policies: which of the router's candidates a layer executes.

A policy is one onnxscript function that becomes a model-local function of the artifact. One that
shares k activations per token out:

    policy(weights [T, K] float32, ids [T, K] int64, real [B, S] bool; k, ...) -> keep [T, K] bool

``weights`` and ``ids`` are a token's candidates, best first; T = B * S tokens, batch-major;
``real`` is False for padding, which must keep nothing; further attributes are the policy's own.
One that compares scores with a threshold gives the scores, and `keep_scored` does the rest:

    score(weights [T, K] float32, ids [T, K] int64, sizes [E] float32) -> scores [T, K] float32

Both lowerings take the keep mask from here, so a new policy is one new function and one line in
`POLICIES` or `SCORES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnxscript import OnnxFunction

from alloc_moe.passes.experts.policies.pooled import keep_pooled
from alloc_moe.passes.experts.policies.scored import (
    score_price,
    score_ratio,
    score_top_p,
    score_weight,
)
from alloc_moe.passes.experts.policies.static import keep_pooled_static
from alloc_moe.passes.experts.policies.top_k import keep_all


@dataclass(frozen=True)
class Policy:
    """A function and the attributes it is called with besides ``k``."""

    function: OnnxFunction[..., Any]
    attributes: dict[str, list[int]] = field(default_factory=dict)


TOP_K = Policy(keep_all)
POLICIES: dict[str, Policy] = {
    "none": TOP_K,
    "batch": Policy(keep_pooled, {"pool_shape": [1, -1]}),
    "sequence": Policy(keep_pooled, {"pool_shape": [0, -1]}),
}
"""Name of a redistribution that shares activations out -> its policy."""
STATIC_POLICIES: dict[str, Policy] = {
    "none": TOP_K,
    "batch": Policy(keep_pooled_static, {"pool_shape": [1, -1]}),
    "sequence": Policy(keep_pooled_static, {"pool_shape": [0, -1]}),
}
"""The same for CUDA, where a size that depends on values has to be waited for."""
SCORES: dict[str, OnnxFunction[..., Any]] = {
    "threshold": score_weight,
    "price": score_price,
    "top-p": score_top_p,
    "ratio": score_ratio,
}
"""Name of a redistribution that compares scores with a threshold -> its score."""
