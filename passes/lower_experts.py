"""Lower RoutedExperts to onnxruntime's MoE operator, specialised to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import OnnxFunction

from alloc_moe.passes import routing
from alloc_moe.passes.base import DOMAIN, add_function, routed_experts
from alloc_moe.passes.policies import POLICIES, TOP_K

MICROSOFT = "com.microsoft"
ROUTER_PROBS = "alloc_moe.router_probs.{layer}"
DROPPED = -1e4

_Attribute = int | float | str | list[int]


@dataclass(frozen=True)
class Allocation:
    """What the lowering needs of a plan.

    ``experts_per_token[l]`` is the k of layer l, ``redistribution`` a name in `POLICIES`.
    """

    experts_per_token: Sequence[int]
    redistribution: str
    weights: str = "keep"


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
        layer = node.attributes["layer"].as_int()
        _, expert_ids, expert_weights = node.inputs[:3]
        assert expert_ids is not None
        assert expert_ids.shape is not None
        trained = int(expert_ids.shape[1])  # type: ignore[arg-type]
        k = self._allocation.experts_per_token[layer]
        # With k = 1 or k = K there is nothing to compete for.
        pooled = self._allocation.redistribution != "none" and 1 < k < trained
        policy = POLICIES[self._allocation.redistribution] if pooled else TOP_K
        candidates = trained if pooled else k
        ranked, ids = builder.call(
            routing.rank_candidates, [expert_weights, expert_ids], candidates=candidates
        )
        (keep,) = builder.call(policy.function, [ranked, ids, real], k=k, **policy.attributes)
        if self._allocation.weights == "renorm" and k < trained:
            (ranked,) = builder.call(routing.renormalize, [expert_weights, ranked, keep])
        output = self._lower(builder, node, _Routing(ranked, ids, keep, candidates, layer))
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        builder.model.graph.remove(node, safe=True)

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in routed_experts(model)]
        if left:
            raise ir.passes.PostconditionError(f"RoutedExperts nodes are left: {left}.")


@dataclass(frozen=True)
class _Routing:
    """A layer's ranked candidates [T, candidates] and which of them are kept."""

    weights: ir.Value
    ids: ir.Value
    keep: ir.Value
    candidates: int
    layer: int


class _Builder:
    """Inserts nodes before a node of the main graph."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model = model
        self.at(before)

    def at(self, before: ir.Node) -> None:
        self._before = before
        self._prefix = before.name or "routed_experts"

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


def _lower_mask(builder: _Builder, node: ir.Node, routing_: _Routing) -> ir.Value:
    probabilities, total = builder.call(
        routing.mask_lowering,
        [routing_.weights, routing_.ids, routing_.keep],
        experts=_num_experts(node),
        dropped=DROPPED,
    )
    output = _moe(builder, node, node.inputs[0], probabilities, routing_.candidates, routing_.layer)
    (scale,) = builder.op("CastLike", [total, output])
    return builder.op("Mul", [output, scale])[0]


def _lower_pairs(builder: _Builder, node: ir.Node, routing_: _Routing) -> ir.Value:
    token, probabilities, weights, slots = builder.call(
        routing.pairs_lowering,
        [routing_.weights, routing_.ids, routing_.keep],
        experts=_num_experts(node),
        dropped=DROPPED,
    )
    (rows,) = builder.op("Gather", [node.inputs[0], token], attributes={"axis": 0})
    outputs = _moe(builder, node, rows, probabilities, 1, routing_.layer)
    return builder.call(routing.combine_pairs, [outputs, weights, slots])[0]


def _num_experts(node: ir.Node) -> int:
    gate_up = node.inputs[3]
    assert gate_up is not None
    assert gate_up.shape is not None
    return int(gate_up.shape[0])  # type: ignore[arg-type]


def _moe(
    builder: _Builder,
    node: ir.Node,
    hidden: ir.Value | None,
    probabilities: ir.Value,
    k: int,
    layer: int,
) -> ir.Value:
    probabilities.name = ROUTER_PROBS.format(layer=layer)
    # Absent optional inputs at the end are not even listed.
    gate_up, gate_up_bias, down, down_bias = (*node.inputs[3:7], None)[:4]
    assert gate_up is not None
    assert gate_up.dtype is not None
    if gate_up.dtype != ir.DataType.FLOAT:
        to = {"to": int(gate_up.dtype)}
        (probabilities,) = builder.op("Cast", [probabilities], attributes=to)
    return builder.op(
        "MoE",
        [hidden, probabilities, gate_up, gate_up_bias, down, down_bias],
        MICROSOFT,
        {
            "k": k,
            # The weights go in as logarithms: normalised over the top k they come out as weights.
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        },
    )[0]
