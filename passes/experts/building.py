"""Nodes that lowerings are built of: functions, constants, and onnxruntime's MoE operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OnnxFunction

from alloc_moe.passes.base import DOMAIN, MICROSOFT, add_function, add_initializer
from alloc_moe.passes.experts import routing
from alloc_moe.passes.experts.gate import swiglu
from alloc_moe.passes.experts.quantize import DOWN_SCALES, GATE_UP_SCALES, expert_format
from alloc_moe.passes.experts.router_order import is_ranked
from alloc_moe.passes.linear.quantize import INT8_ACTIVATIONS

DROPPED = -1e4
"""The log weight of an expert that a token doesn't take."""

ROUTER_PROBS = "alloc_moe.router_probs.{layer}"

Attribute = int | float | str | list[int]


@dataclass(frozen=True)
class Routing:
    """A layer's ranked candidates [T, candidates] and which of them are kept.

    ``real`` [B, S] are the tokens that are no padding, ``dropped`` is whether some of the router's
    may be left out, ``fixed`` whether real tokens keep all candidates, ``renormalized`` whether
    weights were scaled to the sum of all of the router's.
    """

    weights: ir.Value
    ids: ir.Value
    keep: ir.Value
    real: ir.Value
    candidates: int
    layer: int
    dropped: bool
    fixed: bool = False
    renormalized: bool = False


class Builder:
    """Inserts nodes before a node of the main graph."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model = model
        self.at(before)

    def at(self, before: ir.Node) -> None:
        """Insert before this node from now on, and name nodes after it."""
        self._before = before
        self._prefix = before.name or "routed_experts"
        self._named: dict[str, int] = {}

    def constant(
        self,
        name: str,
        value: float | Sequence[float] | np.ndarray,
        dtype: type[np.floating] = np.float32,
    ) -> ir.Value:
        """Add an initializer."""
        return add_initializer(
            self.model, ir.tensor(np.asarray(value, dtype), name=f"{DOMAIN}.{name}")
        )

    def call(
        self,
        function: OnnxFunction[..., Any],
        inputs: Sequence[ir.Value | None],
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Call a model-local function."""
        add_function(self.model, function)
        return self.op(function.name, inputs, DOMAIN, attributes, len(function.function_ir.outputs))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        attributes: Mapping[str, Attribute] | None = None,
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Add a node."""
        name = f"{self._prefix}.{op_type}"
        number = self._named[name] = self._named.get(name, 0) + 1
        name += f".{number}" if number > 1 else ""
        node = ir.node(
            op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
        self.model.graph.insert_before(self._before, node)
        return node.outputs


def layer_of(node: ir.Node) -> int:
    """Return which of the MoE layers a node is."""
    return node.attributes["layer"].as_int()


def trained_experts(node: ir.Node) -> int:
    """The number of candidates that the router gives a token."""
    ids = node.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    return int(ids.shape[1])  # type: ignore[arg-type]


def rank(builder: Builder, node: ir.Node, candidates: int) -> Sequence[ir.Value]:
    """Return weights and ids of the best candidates of each token, best first."""
    _, ids, weights = node.inputs[:3]
    if not is_ranked(weights, ids):
        return builder.call(routing.rank_candidates, [weights, ids], candidates=candidates)
    assert weights is not None
    assert ids is not None
    if candidates == trained_experts(node) and weights.dtype == ir.DataType.FLOAT:
        return weights, ids
    return builder.call(routing.first_candidates, [weights, ids], candidates=candidates)


def num_experts(node: ir.Node) -> int:
    """Return how many experts a layer has."""
    gate_up = node.inputs[3]
    assert gate_up is not None
    assert gate_up.shape is not None
    return int(gate_up.shape[0])  # type: ignore[arg-type]


def cast(builder: Builder, value: ir.Value, like: ir.Value | None) -> ir.Value:
    """Return `value`, float32 if it has no type, in the type of another."""
    assert like is not None
    if like.dtype in (None, value.dtype or ir.DataType.FLOAT):
        return value
    assert like.dtype is not None
    return builder.op("Cast", [value], attributes={"to": int(like.dtype)})[0]


def moe(
    builder: Builder,
    node: ir.Node,
    hidden: ir.Value | None,
    probabilities: ir.Value,
    k: int,
) -> ir.Value:
    """Add an MoE node: its weights are the softmax over its top k."""
    # Absent optional inputs at the end are not even listed.
    gate_up, gate_up_bias, down, down_bias = (*node.inputs[3:7], None)[:4]
    probabilities = cast(builder, probabilities, gate_up)
    # Weights go in as logarithms: normalised over the top k they come out as weights.
    attributes = {"k": k, "normalize_routing_weights": 1, **swiglu(node)}
    inputs = [hidden, probabilities, gate_up, gate_up_bias, down, down_bias]
    return builder.op("MoE", inputs, MICROSOFT, attributes)[0]


def qmoe(
    builder: Builder,
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
