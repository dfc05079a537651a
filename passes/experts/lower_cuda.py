"""Experts on CUDA, whose kernel runs an expert whatever its weight."""

from __future__ import annotations

import onnx_ir as ir

from alloc_moe.passes.base import GATE_UP
from alloc_moe.passes.experts import redirect
from alloc_moe.passes.experts.building import (
    DROPPED,
    ROUTER_PROBS,
    Builder,
    Routing,
    cast,
    moe,
    num_experts,
    qmoe,
    trained_experts,
)
from alloc_moe.passes.experts.quantize import expert_format
from alloc_moe.passes.experts.router_order import softmax_router

FEW_TOKENS = 16
"""Up to so many tokens in a call, as in decode, nothing depends on values but values."""
SPARE = 0.9 * DROPPED
"""What stands for an expert that is run for nothing: its place in the order, but not counted."""


def lower_for_cuda(builder: Builder, node: ir.Node, routing: Routing) -> ir.Value:
    """Return what the experts give: the operator with its own k, or with a row for each pair."""
    if not routing.fixed:
        return _lower_rows(builder, node, routing)
    direct = _lower_router(builder, node, routing)
    return direct if direct is not None else _lower_tokens(builder, node, routing)


def _lower_rows(builder: Builder, node: ir.Node, routing: Routing) -> ir.Value:
    token, probabilities, slots, weights = builder.call(
        redirect.route_rows,
        [routing.weights, routing.ids, routing.keep],
        candidates=routing.candidates,
        experts=num_experts(node),
        dropped=DROPPED,
        spare=SPARE,
        few=FEW_TOKENS,
    )
    probabilities.name = ROUTER_PROBS.format(layer=routing.layer)
    (rows,) = builder.op("Gather", [node.inputs[0], token], attributes={"axis": 0})
    outputs = _operator(builder, node, rows, probabilities, 1)
    return builder.call(redirect.combine_rows, [outputs, weights, slots])[0]


def _lower_tokens(builder: Builder, node: ir.Node, routing: Routing) -> ir.Value:
    probabilities, total = builder.call(
        redirect.route_tokens,
        [routing.weights, routing.ids, routing.keep],
        experts=num_experts(node),
        dropped=DROPPED,
        spare=SPARE,
    )
    probabilities.name = ROUTER_PROBS.format(layer=routing.layer)
    output = _operator(builder, node, node.inputs[0], probabilities, routing.candidates)
    return builder.op("Mul", [output, cast(builder, total, node.inputs[0])])[0]


def _lower_router(builder: Builder, node: ir.Node, routing: Routing) -> ir.Value | None:
    """Give the operator what the router computed, if it chooses as the operator does.

    Its weights are the softmax over its top k: of a router's softmax over all experts they differ
    by a factor for each token. (Told not to normalise, the kernels on CPU and CUDA differ.)
    """
    router = softmax_router(node.inputs[2], node.inputs[1])
    gate_up = node.inputs[GATE_UP]
    if router is None or gate_up is None or router.logits.dtype != gate_up.dtype:
        return None  # bytes, or logits that would have to be rounded
    (logits,) = builder.call(redirect.mask_padding, [router.logits, routing.real], spare=SPARE)
    logits.type = router.logits.type
    logits.name = ROUTER_PROBS.format(layer=routing.layer)
    output = moe(builder, node, node.inputs[0], logits, routing.candidates)
    all_kept = routing.candidates == trained_experts(node)
    if router.normalized and (all_kept or routing.renormalized):
        return output
    (total,) = builder.call(redirect.sum_kept, [routing.weights, routing.keep])
    return builder.op("Mul", [output, cast(builder, total, node.inputs[0])])[0]


def _operator(
    builder: Builder, node: ir.Node, hidden: ir.Value | None, probabilities: ir.Value, k: int
) -> ir.Value:
    if expert_format(node) is None:
        return moe(builder, node, hidden, probabilities, k)
    # Without weights of their own, these are the softmax over those chosen.
    return qmoe(builder, node, hidden, cast(builder, probabilities, node.inputs[0]), k)
