"""RoutedExperts: the choice of experts, and what they add."""

from __future__ import annotations

import onnx_ir as ir

from alloc_moe.passes.base import DOWN, DOWN_BIAS, GATE_UP, GATE_UP_BIAS
from alloc_moe.passes.experts.gate import is_silu
from alloc_moe.passes.experts.quantize import DOWN_SCALES, GATE_UP_SCALES, expert_format
from alloc_moe.passes.step.matching import (
    NotExpressibleError,
    argument,
    check_block,
    past_casts,
    producer,
    sizes,
    weight_name,
)
from alloc_moe.passes.step.operators.keep import keep_of, weights_of
from alloc_moe.passes.step.operators.products import PRODUCTS, product_weight
from alloc_moe.passes.step.operators.routing import Matched, match_router
from alloc_moe.passes.step.parts import ExpertFormats, Format
from alloc_moe.passes.step.records import ROUTED, Experts, Route
from alloc_moe.passes.step.state import Results, Walk


def visit(walk: Walk, node: ir.Node) -> Results:
    """Write down a route, and the experts it leads to."""
    x = walk.whole(node.inputs[0])
    if not is_silu(node):
        raise NotExpressibleError("its experts' gate is no plain SiLU")
    matched = match_router(node)
    layer = node.attributes["layer"].as_int()
    routing = walk.buffer(0, ROUTED)
    route = _route(walk, matched, layer, routing.buffer)
    if route.keep.token_sizes is not None and route.x != x.buffer:
        raise NotExpressibleError("its router reads something else than its experts")
    walk.add(route)
    gate_up, down = _required(node, GATE_UP), _required(node, DOWN)
    shape = sizes(argument(node, GATE_UP))
    if len(shape) != 3 or shape[1] is None:
        raise NotExpressibleError("its experts are of no fixed size")
    made = walk.buffer(x.width)
    walk.add(
        Experts(
            x.buffer,
            routing.buffer,
            gate_up,
            down,
            made.buffer,
            x.width,
            shape[1] // 2,
            gate_up_bias=_optional(node, GATE_UP_BIAS),
            down_bias=_optional(node, DOWN_BIAS),
            format=_formats(node),
        )
    )
    return {node.outputs[0]: made}


def _route(walk: Walk, matched: Matched, layer: int, out: str) -> Route:
    node, bias = matched.logits.producer(), None
    if node is not None and node.op_type == "Add":
        first, second = node.inputs
        bias, node = weight_name(second), producer(first, *PRODUCTS)
        if bias is None:
            raise NotExpressibleError("its router adds something else than a bias")
    if node is None or node.op_type not in PRODUCTS:
        raise NotExpressibleError("its router's logits are no product")
    weight = product_weight(node)
    x = walk.whole(past_casts(node.inputs[0]))
    if x.width != weight.k:
        raise NotExpressibleError("its router reads something else than hidden states")
    trained = matched.router.top_k
    return Route(
        x.buffer,
        weight.name,
        out,
        weight.n,
        weight.k,
        matched.router,
        keep_of(walk.allocation, layer, trained),
        weights_of(walk.allocation, layer, trained),
        bias=bias or weight.bias,
        format=weight.format,
    )


def _formats(node: ir.Node) -> ExpertFormats | None:
    form = expert_format(node)
    if form is None:
        return None
    check_block(form.bits, form.block)
    gate_up, down = _required(node, GATE_UP_SCALES), _required(node, DOWN_SCALES)
    return ExpertFormats(
        Format(form.bits, form.block, gate_up), Format(form.bits, form.block, down)
    )


def _required(node: ir.Node, index: int) -> str:
    name = weight_name(argument(node, index))
    if name is None:
        raise NotExpressibleError("its experts' weights are no constants")
    return name


def _optional(node: ir.Node, index: int) -> str | None:
    return None if argument(node, index) is None else _required(node, index)
