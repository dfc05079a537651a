"""Lower RoutedExperts to onnxruntime's MoE operator, specialised to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.attention.group_query_rotary import right_padded_rows
from alloc_moe.passes.attention.right_padded import REAL
from alloc_moe.passes.base import MICROSOFT, routed_experts
from alloc_moe.passes.experts import routing
from alloc_moe.passes.experts.building import (
    DROPPED,
    ROUTER_PROBS,
    Builder,
    Routing,
    cast,
    layer_of,
    moe,
    num_experts,
    qmoe,
    rank,
    trained_experts,
)
from alloc_moe.passes.experts.lower_cuda import lower_for_cuda
from alloc_moe.passes.experts.policies import POLICIES, SCORES, STATIC_POLICIES, TOP_K
from alloc_moe.passes.experts.policies.scored import (
    cap_call,
    keep_scored,
    keep_scored_by_row,
    scale_by_token,
    score_overlapping,
)
from alloc_moe.passes.experts.policies.static import cap_call_static
from alloc_moe.passes.experts.quantize import expert_format

ROUTER_WEIGHTS = "alloc_moe.router_weights.{layer}"
PRICE_INPUT = "alloc_moe.price"


@dataclass(frozen=True, eq=False)
class TokenFactors:
    """What a token's hidden state h [hidden] multiplies its experts' sizes by [experts].

    That is ``exp(clip(h @ matrix + bias))``, the logarithm clipped to ``limit`` up and down.
    """

    matrix: np.ndarray  # [hidden, experts] float32
    bias: np.ndarray  # [experts] float32
    limit: float


@dataclass(frozen=True)
class Allocation:
    """What the lowering needs of a plan.

    ``experts_per_token[l]`` is the k of layer l, ``redistribution`` a name in `POLICIES` or
    `SCORES`. For the latter, scores of ``thresholds[l]`` or more are kept, and ``cap`` limits calls
    to that multiple of k. ``sizes[l]`` are those of the experts, for ``price``, whose threshold is
    the same in all layers, and ``token_factors[l]``, if any, what tokens multiply these by;
    ``overlap`` is how far what two of them add points the same way. With ``dial`` the price is an
    input of the graph that may be left out: a scalar, or with ``price_per_sequence`` one of each
    sequence [batch], or of all [1].
    """

    experts_per_token: Sequence[float]
    redistribution: str
    weights: str = "keep"
    thresholds: Sequence[float] = ()
    sizes: Sequence[Sequence[float] | None] = ()
    token_factors: Sequence[TokenFactors | None] = ()
    overlap: float = 0.0
    cap: float | None = None
    dial: bool = False
    price_per_sequence: bool = False


class LowerExpertsPass(ir.passes.InPlacePass):
    """Replace each RoutedExperts node by ranking, policy and an MoE node.

    Args:
        allocation: The plan's part that the graph depends on.
        pairs: Run the op with k = 1 for the kept (token, expert) pairs, for execution providers
            whose kernel doesn't skip experts of weight zero. Otherwise mask the dropped.
    """

    def __init__(self, allocation: Allocation, *, pairs: bool) -> None:
        super().__init__()
        self._allocation = allocation
        self._policies = STATIC_POLICIES if pairs else POLICIES
        self._cap = cap_call_static if pairs else cap_call
        self._lower = lower_for_cuda if pairs else _lower_mask

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = list(routed_experts(model))
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        builder = Builder(model, nodes[0])
        real = _real_tokens(builder)
        for node in nodes:
            builder.at(node)
            self._lower_node(builder, node, real)
        return ir.passes.PassResult(model, modified=True)

    def _lower_node(self, builder: Builder, node: ir.Node, real: ir.Value) -> None:
        scored = self._allocation.redistribution in SCORES and trained_experts(node) > 1
        choose = self._choose_by_score if scored else self._choose_k
        chosen = choose(builder, node, real)
        if self._allocation.weights == "renorm" and chosen.dropped:
            (weights,) = builder.call(
                routing.renormalize, [node.inputs[2], chosen.weights, chosen.keep]
            )
            chosen = dataclasses.replace(chosen, weights=weights, renormalized=True)
        output = self._lower(builder, node, chosen)
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        builder.model.graph.remove(node, safe=True)

    def _choose_k(self, builder: Builder, node: ir.Node, real: ir.Value) -> Routing:
        """Keep k candidates of each token, or as many in the mean."""
        layer, trained = layer_of(node), trained_experts(node)
        k = int(self._allocation.experts_per_token[layer])
        # With k = 1 or k = K there is nothing to compete for.
        pooled = self._allocation.redistribution != "none" and 1 < k < trained
        policy = self._policies[self._allocation.redistribution] if pooled else TOP_K
        candidates = trained if pooled else k
        ranked, ids = rank(builder, node, candidates)
        (keep,) = builder.call(policy.function, [ranked, ids, real], k=k, **policy.attributes)
        return Routing(
            ranked, ids, keep, real, candidates, layer, dropped=k < trained, fixed=not pooled
        )

    def _choose_by_score(self, builder: Builder, node: ir.Node, real: ir.Value) -> Routing:
        """Keep the candidates whose score reaches the threshold, if the cap has room."""
        allocation, layer, trained = self._allocation, layer_of(node), trained_experts(node)
        ranked, ids = rank(builder, node, trained)
        given = allocation.sizes[layer] if layer < len(allocation.sizes) else None
        sizes = None if given is None else builder.constant(f"sizes.{layer}", given)
        weights = self._scaled(builder, node, ranked, ids)
        if allocation.overlap:
            overlap = builder.constant(f"overlap.{layer}", 2 * allocation.overlap)
            (scores,) = builder.call(score_overlapping, [weights, ids, sizes, overlap])
        else:
            (scores,) = builder.call(SCORES[allocation.redistribution], [weights, ids, sizes])
        threshold = self._threshold(builder, layer)
        compare = keep_scored_by_row if allocation.price_per_sequence else keep_scored
        (keep,) = builder.call(compare, [scores, real, threshold], others=[trained - 1])
        quota = trained - 1.0
        if allocation.cap is not None:
            quota = min(trained, allocation.cap * allocation.experts_per_token[layer]) - 1
        if quota < trained - 1:
            # In double precision, as the reference computes it.
            limit = builder.constant(f"quota.{layer}", quota, np.float64)
            (keep,) = builder.call(self._cap, [scores, keep, real, limit])
        return Routing(ranked, ids, keep, real, trained, layer, dropped=True)

    def _scaled(
        self, builder: Builder, node: ir.Node, weights: ir.Value, ids: ir.Value
    ) -> ir.Value:
        """Return the weights that are scored: the router's, as large as the token makes them."""
        given, layer = self._allocation.token_factors, layer_of(node)
        factors = given[layer] if layer < len(given) else None
        if factors is None:
            return weights
        hidden = node.inputs[0]
        assert hidden is not None
        if hidden.dtype != ir.DataType.FLOAT:
            (hidden,) = builder.op("Cast", [hidden], attributes={"to": int(ir.DataType.FLOAT)})
        constants = [
            builder.constant(f"token_{field.name}.{layer}", getattr(factors, field.name))
            for field in dataclasses.fields(factors)
        ]
        return builder.call(scale_by_token, [weights, ids, hidden, *constants])[0]

    def _threshold(self, builder: Builder, layer: int) -> ir.Value:
        threshold = self._allocation.thresholds[layer]
        if self._allocation.redistribution != "price":
            return builder.constant(f"threshold.{layer}", threshold)
        if PRICE_INPUT in builder.model.graph.initializers:
            return builder.model.graph.initializers[PRICE_INPUT]
        several = self._allocation.price_per_sequence
        given = [threshold] if several else threshold
        price = builder.constant(PRICE_INPUT.partition(".")[2], given)
        if several:
            price.shape = ir.Shape(["prices"])
        if self._allocation.dial:
            # An initializer that is an input too: a value to be left out or overridden.
            builder.model.graph.inputs.append(price)
        return price

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in routed_experts(model)]
        if left:
            raise ir.passes.PostconditionError(f"RoutedExperts nodes are left: {left}.")


def _real_tokens(builder: Builder) -> ir.Value:
    inputs = {value.name: value for value in builder.model.graph.inputs}
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    rows = right_padded_rows(builder.model)
    if rows is not None:
        return rows.outputs[REAL]
    if mask is None:
        (real,) = builder.call(routing.all_tokens, [ids])
    else:
        (real,) = builder.call(routing.real_tokens, [mask, ids])
    return real


def _lower_mask(builder: Builder, node: ir.Node, routing_: Routing) -> ir.Value:
    candidates = [routing_.weights, routing_.ids, routing_.keep, routing_.real]
    experts, k, layer = num_experts(node), routing_.candidates, routing_.layer
    if expert_format(node) is not None:
        (weights,) = builder.call(routing.dense_weights, candidates, experts=experts)
        weights.name = ROUTER_WEIGHTS.format(layer=layer)
        weights = cast(builder, weights, node.inputs[0])
        return qmoe(builder, node, node.inputs[0], weights, k, weights=weights)
    probabilities, total = builder.call(
        routing.mask_lowering, candidates, experts=experts, dropped=DROPPED
    )
    probabilities.name = ROUTER_PROBS.format(layer=layer)
    output = moe(builder, node, node.inputs[0], probabilities, k)
    (scale,) = builder.op("CastLike", [total, output])
    return builder.op("Mul", [output, scale])[0]
