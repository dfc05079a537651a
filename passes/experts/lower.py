"""Lower RoutedExperts to onnxruntime's MoE operator, specialised to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OnnxFunction

from alloc_moe.passes.base import (
    DOMAIN,
    MICROSOFT,
    add_function,
    add_initializer,
    routed_experts,
)
from alloc_moe.passes.experts import routing
from alloc_moe.passes.experts.gate import swiglu
from alloc_moe.passes.experts.policies import POLICIES, SCORES, TOP_K
from alloc_moe.passes.experts.policies.scored import cap_call, keep_scored, score_overlapping
from alloc_moe.passes.experts.quantize import DOWN_SCALES, GATE_UP_SCALES, expert_format
from alloc_moe.passes.experts.router_order import is_ranked
from alloc_moe.passes.linear.quantize import INT8_ACTIVATIONS

ROUTER_PROBS = "alloc_moe.router_probs.{layer}"
ROUTER_WEIGHTS = "alloc_moe.router_weights.{layer}"
DROPPED = -1e4
PRICE_INPUT = "alloc_moe.price"

_Attribute = int | float | str | list[int]


@dataclass(frozen=True)
class Allocation:
    """What the lowering needs of a plan.

    ``experts_per_token[l]`` is the k of layer l, ``redistribution`` a name in `POLICIES` or
    `SCORES`. For the latter, scores of ``thresholds[l]`` or more are kept, and ``cap`` limits calls
    to that multiple of k. ``sizes[l]`` are those of the experts, for ``price``, whose threshold is
    the same in all layers; ``overlap`` is how far what two of them add points the same way. With
    ``dial`` the price is an input of the graph that may be left out.
    """

    experts_per_token: Sequence[float]
    redistribution: str
    weights: str = "keep"
    thresholds: Sequence[float] = ()
    sizes: Sequence[Sequence[float] | None] = ()
    overlap: float = 0.0
    cap: float | None = None
    dial: bool = False


class LowerExpertsPass(ir.passes.InPlacePass):
    """Replace each RoutedExperts node by ranking, policy and an MoE node.

    Args:
        allocation: The plan's part that the graph depends on.
        pairs: Compact the kept (token, expert) pairs and run the op with k = 1, for execution
            providers whose kernel doesn't skip experts of weight zero. Otherwise mask the dropped.
    """

    def __init__(self, allocation: Allocation, *, pairs: bool) -> None:
        super().__init__()
        self._allocation = allocation
        self._lower = _lower_pairs if pairs else _lower_mask

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = list(routed_experts(model))
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        builder = _Builder(model, nodes[0])
        real = _real_tokens(builder)
        for node in nodes:
            builder.at(node)
            self._lower_node(builder, node, real)
        return ir.passes.PassResult(model, modified=True)

    def _lower_node(self, builder: _Builder, node: ir.Node, real: ir.Value) -> None:
        scored = self._allocation.redistribution in SCORES and _trained(node) > 1
        choose = self._choose_by_score if scored else self._choose_k
        chosen = choose(builder, node, real)
        if self._allocation.weights == "renorm" and chosen.dropped:
            (weights,) = builder.call(
                routing.renormalize, [node.inputs[2], chosen.weights, chosen.keep]
            )
            chosen = dataclasses.replace(chosen, weights=weights)
        output = self._lower(builder, node, chosen)
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        builder.model.graph.remove(node, safe=True)

    def _choose_k(self, builder: _Builder, node: ir.Node, real: ir.Value) -> _Routing:
        """Keep k candidates of each token, or as many in the mean."""
        layer, trained = _layer(node), _trained(node)
        k = int(self._allocation.experts_per_token[layer])
        # With k = 1 or k = K there is nothing to compete for.
        pooled = self._allocation.redistribution != "none" and 1 < k < trained
        policy = POLICIES[self._allocation.redistribution] if pooled else TOP_K
        candidates = trained if pooled else k
        ranked, ids = _rank(builder, node, candidates)
        (keep,) = builder.call(policy.function, [ranked, ids, real], k=k, **policy.attributes)
        return _Routing(ranked, ids, keep, real, candidates, layer, dropped=k < trained)

    def _choose_by_score(self, builder: _Builder, node: ir.Node, real: ir.Value) -> _Routing:
        """Keep the candidates whose score reaches the threshold, if the cap has room."""
        allocation, layer, trained = self._allocation, _layer(node), _trained(node)
        ranked, ids = _rank(builder, node, trained)
        given = allocation.sizes[layer] if layer < len(allocation.sizes) else None
        sizes = None if given is None else builder.constant(f"sizes.{layer}", given)
        if allocation.overlap:
            overlap = builder.constant(f"overlap.{layer}", 2 * allocation.overlap)
            (scores,) = builder.call(score_overlapping, [ranked, ids, sizes, overlap])
        else:
            (scores,) = builder.call(SCORES[allocation.redistribution], [ranked, ids, sizes])
        threshold = self._threshold(builder, layer)
        (keep,) = builder.call(keep_scored, [scores, real, threshold], others=[trained - 1])
        quota = trained - 1.0
        if allocation.cap is not None:
            quota = min(trained, allocation.cap * allocation.experts_per_token[layer]) - 1
        if quota < trained - 1:
            # In double precision, as the reference computes it.
            limit = builder.constant(f"quota.{layer}", quota, np.float64)
            (keep,) = builder.call(cap_call, [scores, keep, real, limit])
        return _Routing(ranked, ids, keep, real, trained, layer, dropped=True)

    def _threshold(self, builder: _Builder, layer: int) -> ir.Value:
        threshold = self._allocation.thresholds[layer]
        if self._allocation.redistribution != "price":
            return builder.constant(f"threshold.{layer}", threshold)
        if PRICE_INPUT in builder.model.graph.initializers:
            return builder.model.graph.initializers[PRICE_INPUT]
        price = builder.constant(PRICE_INPUT.partition(".")[2], threshold)
        if self._allocation.dial:
            # An initializer that is an input too: a value to be left out or overridden.
            builder.model.graph.inputs.append(price)
        return price

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in routed_experts(model)]
        if left:
            raise ir.passes.PostconditionError(f"RoutedExperts nodes are left: {left}.")


@dataclass(frozen=True)
class _Routing:
    """A layer's ranked candidates [T, candidates] and which of them are kept.

    ``real`` [B, S] are the tokens that are no padding, ``dropped`` is whether some of the router's
    may be left out.
    """

    weights: ir.Value
    ids: ir.Value
    keep: ir.Value
    real: ir.Value
    candidates: int
    layer: int
    dropped: bool


class _Builder:
    """Inserts nodes before a node of the main graph."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model = model
        self.at(before)

    def at(self, before: ir.Node) -> None:
        self._before = before
        self._prefix = before.name or "routed_experts"

    def constant(
        self, name: str, value: float | Sequence[float], dtype: type[np.floating] = np.float32
    ) -> ir.Value:
        """Add an initializer."""
        return add_initializer(
            self.model, ir.tensor(np.asarray(value, dtype), name=f"{DOMAIN}.{name}")
        )

    def call(
        self,
        function: OnnxFunction[..., Any],
        inputs: Sequence[ir.Value | None],
        **attributes: _Attribute,
    ) -> Sequence[ir.Value]:
        """Call a model-local function."""
        add_function(self.model, function)
        return self.op(function.name, inputs, DOMAIN, attributes, len(function.function_ir.outputs))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        attributes: Mapping[str, _Attribute] | None = None,
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        name = f"{self._prefix}.{op_type}"
        node = ir.node(
            op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
        self.model.graph.insert_before(self._before, node)
        return node.outputs


def _real_tokens(builder: _Builder) -> ir.Value:
    inputs = {value.name: value for value in builder.model.graph.inputs}
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if mask is None:
        (real,) = builder.call(routing.all_tokens, [ids])
    else:
        (real,) = builder.call(routing.real_tokens, [mask, ids])
    return real


def _layer(node: ir.Node) -> int:
    return node.attributes["layer"].as_int()


def _trained(node: ir.Node) -> int:
    """The number of candidates that the router gives a token."""
    ids = node.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    return int(ids.shape[1])  # type: ignore[arg-type]


def _rank(builder: _Builder, node: ir.Node, candidates: int) -> Sequence[ir.Value]:
    _, ids, weights = node.inputs[:3]
    if not is_ranked(weights, ids):
        return builder.call(routing.rank_candidates, [weights, ids], candidates=candidates)
    assert weights is not None
    assert ids is not None
    if candidates == _trained(node) and weights.dtype == ir.DataType.FLOAT:
        return weights, ids
    return builder.call(routing.first_candidates, [weights, ids], candidates=candidates)


def _lower_mask(builder: _Builder, node: ir.Node, routing_: _Routing) -> ir.Value:
    candidates = [routing_.weights, routing_.ids, routing_.keep, routing_.real]
    experts, k, layer = _num_experts(node), routing_.candidates, routing_.layer
    if expert_format(node) is not None:
        (weights,) = builder.call(routing.dense_weights, candidates, experts=experts)
        weights.name = ROUTER_WEIGHTS.format(layer=layer)
        weights = _cast(builder, weights, node.inputs[0])
        return _qmoe(builder, node, node.inputs[0], weights, k, weights=weights)
    probabilities, total = builder.call(
        routing.mask_lowering, candidates, experts=experts, dropped=DROPPED
    )
    probabilities.name = ROUTER_PROBS.format(layer=layer)
    output = _moe(builder, node, node.inputs[0], probabilities, k)
    (scale,) = builder.op("CastLike", [total, output])
    return builder.op("Mul", [output, scale])[0]


def _lower_pairs(builder: _Builder, node: ir.Node, routing_: _Routing) -> ir.Value:
    token, probabilities, weights, slots = builder.call(
        routing.pairs_lowering,
        [routing_.weights, routing_.ids, routing_.keep],
        experts=_num_experts(node),
        dropped=DROPPED,
    )
    probabilities.name = ROUTER_PROBS.format(layer=routing_.layer)
    (rows,) = builder.op("Gather", [node.inputs[0], token], attributes={"axis": 0})
    if expert_format(node) is None:
        outputs = _moe(builder, node, rows, probabilities, 1)
    else:
        # Without weights of their own, these are the softmax over the one chosen: 1.
        probabilities = _cast(builder, probabilities, node.inputs[0])
        outputs = _qmoe(builder, node, rows, probabilities, 1)
    return builder.call(routing.combine_pairs, [outputs, weights, slots])[0]


def _num_experts(node: ir.Node) -> int:
    gate_up = node.inputs[3]
    assert gate_up is not None
    assert gate_up.shape is not None
    return int(gate_up.shape[0])  # type: ignore[arg-type]


def _cast(builder: _Builder, value: ir.Value, like: ir.Value | None) -> ir.Value:
    """Return `value`, float32, in the type of another."""
    assert like is not None
    if like.dtype in (None, ir.DataType.FLOAT):
        return value
    assert like.dtype is not None
    return builder.op("Cast", [value], attributes={"to": int(like.dtype)})[0]


def _moe(
    builder: _Builder, node: ir.Node, hidden: ir.Value | None, probabilities: ir.Value, k: int
) -> ir.Value:
    # Absent optional inputs at the end are not even listed.
    gate_up, gate_up_bias, down, down_bias = (*node.inputs[3:7], None)[:4]
    probabilities = _cast(builder, probabilities, gate_up)
    # The weights go in as logarithms: normalised over the top k they come out as weights.
    attributes = {"k": k, "normalize_routing_weights": 1, **swiglu(node)}
    inputs = [hidden, probabilities, gate_up, gate_up_bias, down, down_bias]
    return builder.op("MoE", inputs, MICROSOFT, attributes)[0]


def _qmoe(
    builder: _Builder,
    node: ir.Node,
    hidden: ir.Value | None,
    probabilities: ir.Value,
    k: int,
    *,
    weights: ir.Value | None = None,
) -> ir.Value:
    """Add a QMoE node that combines by `weights` [T, E], else by the softmax over its top k."""
    form = expert_format(node)
    assert form is not None
    gate_up, gate_up_bias, down, down_bias = node.inputs[3:7]
    inputs = [hidden, probabilities, gate_up, node.inputs[GATE_UP_SCALES], gate_up_bias]
    inputs += [down, node.inputs[DOWN_SCALES], down_bias]
    if weights is not None:
        inputs += [*[None] * 6, weights]
    attributes = {
        "k": k,
        "normalize_routing_weights": int(weights is None),
        **swiglu(node),
        "expert_weight_bits": form.bits,
        "block_size": form.block,
        "weights_prepacked": 0,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    return builder.op("QMoE", inputs, MICROSOFT, attributes)[0]
