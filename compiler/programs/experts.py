"""What a plan means, in operators that torch can trace: the same policies, and grouped products.

No shape depends on what a router decides. Candidates are sorted by expert, dropped ones last, and
the product stops where these begin, so that experts are computed only where they are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from alloc_moe.compiler.correction.folding import ADDED_BIAS
from alloc_moe.compiler.model.architectures import Gate, first_projection
from alloc_moe.compiler.reference.policies import (
    POLICIES,
    LayerParameters,
    adjust_weights,
    rank_candidates,
)
from alloc_moe.compiler.reference.token_sizes import for_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from alloc_moe.compiler.records import Redistribution, Weights
    from alloc_moe.runtime.artifact.plan import AllocationPlan


@functools.cache
def grouped_product() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what stands for ``aten::_grouped_mm`` while torch traces, registered once per process.

    Torch's own can be traced in bfloat16 only, but runs in float32 too.
    """

    @torch.library.custom_op("alloc_moe::grouped_product", mutates_args=())
    def product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(rows, weights, ends)

    product.register_fake(lambda rows, weights, _: rows.new_empty(rows.shape[0], weights.shape[2]))
    overload: Callable[..., torch.Tensor] = torch.ops.alloc_moe.grouped_product.default
    return overload


@dataclass
class TracedCall:
    """The call that is traced: its real tokens, its price, and the experts kept so far."""

    real: torch.Tensor  # [batch, sequence] bool
    price: torch.Tensor | None = None  # of an activation; negative: that of the plan
    kept: list[torch.Tensor] = field(default_factory=list)  # per MoE layer, [tokens]


def run_planned(
    call: TracedCall,
    plan: AllocationPlan,
    parameters: LayerParameters,
    gate: Gate,
    experts: Any,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs [T, H] of a layer's experts under the plan.

    Args:
        call: What is going on; the kept experts per token are added to it.
        plan: How candidates are chosen and weighed.
        parameters: What it gives this layer.
        gate: That of the experts.
        experts: The experts module.
        hidden: [T, H].
        ids: The router's candidates [T, K].
        weights: Theirs [T, K].
    """
    if call.price is not None:
        compiled = torch.full_like(call.price, cast("float", parameters.threshold))
        threshold = torch.where(call.price < 0, compiled, call.price)
        parameters = dataclasses.replace(parameters, threshold=threshold)
    parameters = for_tokens(parameters, hidden)
    ranked, ranked_ids = rank_candidates(weights, ids)
    policy = POLICIES[cast("Redistribution", plan.redistribution)]
    keep = policy(ranked, ranked_ids, call.real, parameters).mask
    call.kept.append(keep.sum(1))
    adjusted = adjust_weights(cast("Weights", plan.weights), ranked, keep)
    return run_grouped(experts, gate, hidden, ranked_ids, adjusted, keep)


def run_grouped(
    experts: Any,
    gate: Gate,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs [T, H] of the kept candidates; ids, weights and keep are [T, K]."""
    product = grouped_product()
    first = first_projection(experts)
    gate_up, down = getattr(experts, first), experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    count = gate_up.shape[0]
    chosen, order = torch.sort(torch.where(keep, ids, count).flatten(), stable=True)
    ends = torch.searchsorted(chosen, torch.arange(count), right=True).to(torch.int32)
    of_expert = chosen.clamp(max=count - 1)
    rows = product(hidden[order // ids.shape[1]], gate_up, ends)
    if experts.has_bias:
        rows = rows + getattr(experts, f"{first}_bias")[of_expert]
    rows = product(_gated(gate, *_halves(experts, rows)), down, ends)
    bias = experts.down_proj_bias if experts.has_bias else getattr(experts, ADDED_BIAS, None)
    if bias is not None:
        rows = rows + bias[of_expert]
    # Behind the last end there is whatever was in memory.
    share = weights.flatten()[order][:, None].to(rows.dtype)
    rows = torch.where((chosen < count)[:, None], rows * share, 0)
    by_token = torch.zeros_like(rows).index_copy(0, order, rows)
    return by_token.reshape(-1, ids.shape[1], rows.shape[1]).sum(1)


def _halves(experts: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gate and up, which lie one after the other or in turns, or are the same."""
    if not experts.has_gate:
        return rows, rows
    if experts.is_concatenated:
        return rows.chunk(2, dim=-1)
    return rows[:, ::2], rows[:, 1::2]


def _gated(gate: Gate, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    if gate == Gate():  # one operator of torch
        return torch.nn.functional.silu(gates) * ups
    return gate(gates, ups)
