"""Find routers whose candidates come best first, and those that onnxruntime's operator has."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class SoftmaxRouter:
    """A router that takes the softmax of `logits` [T, E] and of that the largest.

    ``normalized`` is whether their weights are divided by their sum.
    """

    logits: ir.Value
    normalized: bool


def softmax_router(weights: ir.Value | None, ids: ir.Value | None) -> SoftmaxRouter | None:
    """Return the router that gives candidates [tokens, candidates], if it is such a one."""
    top = _top_k(ids)
    scores = None if top is None else _uncast(top.inputs[0])
    softmax = None if scores is None else scores.producer()
    weights = _uncast(weights)
    if top is None or softmax is None or weights is None or softmax.op_type != "Softmax":
        return None
    logits = _uncast(softmax.inputs[0])
    if logits is None or _integer(softmax, "axis", -1) not in (-1, 1):
        return None
    if weights is top.outputs[0]:
        return SoftmaxRouter(logits, normalized=False)
    divided = weights.producer()
    if divided is None or divided.op_type != "Div" or _uncast(divided.inputs[0]) is None:
        return None
    share = _uncast(divided.inputs[0])
    total = divided.inputs[1].producer() if divided.inputs[1] is not None else None
    summed = share is top.outputs[0] and total is not None and total.op_type == "ReduceSum"
    if not summed or total is None or _uncast(total.inputs[0]) is not share:
        return None
    return SoftmaxRouter(logits, normalized=True) if _is_one_per_row(divided.inputs[1]) else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Return what a float was before it was rounded, or made longer."""
    node = None if value is None else value.producer()
    return _uncast(node.inputs[0]) if node is not None and _is_float_cast(node) else value


def _is_float_cast(node: ir.Node) -> bool:
    value = node.inputs[0] if node.op_type == "Cast" else None
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def is_ranked(weights: ir.Value | None, ids: ir.Value | None) -> bool:
    """Whether candidates [tokens, candidates] are a TopK's in its order.

    Between it and `weights` may lie what keeps the order of a row: rounding, a softmax, a positive
    factor or divisor. Where that makes equals, their order is the TopK's, as ranking would leave
    it.
    """
    top = _top_k(ids)
    while top is not None and weights is not None and weights is not top.outputs[0]:
        node = weights.producer()
        if node is None or not _keeps_order(node):
            return False
        weights = node.inputs[0]
    return top is not None and weights is not None


def _top_k(ids: ir.Value | None) -> ir.Node | None:
    """Return the TopK along the last axis that gives `ids`, largest first."""
    node = None if ids is None else ids.producer()
    if node is not None and node.op_type == "Cast":
        return _top_k(node.inputs[0])
    if node is None or node.op_type != "TopK" or ids is not node.outputs[1]:
        return None
    falling = all(_integer(node, name, 1) for name in ("largest", "sorted"))
    rank = len(ids.shape) if ids.shape is not None else 0
    return node if falling and _integer(node, "axis", -1) in (-1, rank - 1) else None


def _keeps_order(node: ir.Node) -> bool:
    match node.op_type:
        case "Cast":
            return _is_float_cast(node)
        case "Softmax":
            return _integer(node, "axis", -1) in (-1, 1)
        case "Mul" | "Div":
            return _is_one_per_row(node.inputs[1]) and _is_positive(node.inputs[1])
    return False


def _is_one_per_row(value: ir.Value | None) -> bool:
    shape = None if value is None else value.shape
    return shape is not None and (len(shape) == 0 or shape[-1] == 1)


def _is_positive(value: ir.Value | None) -> bool:
    """Whether all of a value is positive, but where numbers vanish and divide by zero."""
    if value is None:
        return False
    if (constant := ir.convenience.get_const_tensor(value)) is not None:
        return bool((constant.numpy() > 0).all())
    node = value.producer()
    if node is None:
        return False
    match node.op_type:
        case "Softmax" | "Sigmoid":
            return True
        case "TopK":
            return value is node.outputs[0] and _is_positive(node.inputs[0])
        case "Cast" | "ReduceSum":
            return _is_positive(node.inputs[0])
        case "Add" | "Mul":
            return _is_positive(node.inputs[0]) and _is_positive(node.inputs[1])
    return False


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
