"""Elementwise operators and norms, and those that only move numbers about."""

from __future__ import annotations

import onnx_ir as ir

from alloc_moe.passes.step.matching import (
    NotExpressibleError,
    argument,
    constant,
    integer,
    past_casts,
    real,
    scalar,
    sizes,
    weight_name,
)
from alloc_moe.passes.step.operators.products import scaled
from alloc_moe.passes.step.records import Add, AddBias, RmsNorm, ScaleRows, SwiGlu
from alloc_moe.passes.step.state import Known, Lost, Results, Row, Sigmoid, Silu, Walk

_ROWS_TO_HEADS = (0, 2, 1, 3)


def alias(walk: Walk, node: ir.Node) -> Results:
    found = walk.known(node.inputs[0])
    if found is None:
        raise NotExpressibleError(f"it computes {node.op_type}")
    return {node.outputs[0]: found}


def transpose(walk: Walk, node: ir.Node) -> Results:
    if tuple(node.attributes["perm"].as_ints()) != _ROWS_TO_HEADS:
        raise NotExpressibleError("it transposes rows")
    return alias(walk, node)


def split(walk: Walk, node: ir.Node) -> Results:
    given = walk.row(node.inputs[0])
    shape = sizes(node.inputs[0])
    if integer(node, "axis", 0) not in (-1, len(shape) - 1) or shape[-1] != given.width:
        raise NotExpressibleError("it splits heads")
    results: dict[ir.Value, Known] = {}
    offset = given.offset
    for part in node.outputs:
        width = sizes(part)[-1]
        if width is None:
            raise NotExpressibleError("it splits rows into parts of no fixed size")
        results[part] = Row(given.buffer, offset, width, given.whole)
        offset += width
    return results


def slice(walk: Walk, node: ir.Node) -> Results:
    axes = constant(argument(node, 3))
    if axes is not None and axes.tolist() == [1] and len(sizes(node.inputs[0])) == 3:
        return alias(walk, node)  # the last tokens, which with one token are all
    raise NotExpressibleError("it computes with parts of rows")


def where(walk: Walk, node: ir.Node) -> Results:
    """Something else takes the place of rows whose mask is not as it must be."""
    condition, *given = node.inputs
    rows = [found for value in given if (found := walk.known(value)) is not None]
    if walk.known(condition) is not None or len(rows) != 1:
        raise NotExpressibleError("it computes Where")
    return {node.outputs[0]: rows[0]}


def add(walk: Walk, node: ir.Node) -> Results:
    first, second = node.inputs
    if walk.known(first) is None:
        first, second = second, first
    x = walk.whole(first)
    made = walk.buffer(x.width)
    if walk.known(second) is None:
        name, shape = weight_name(second), sizes(past_casts(second))
        if name is None or list(shape) != [x.width]:
            raise NotExpressibleError("it adds something else than a bias or a residual")
        walk.add(AddBias(x.buffer, name, made.buffer, x.width))
        return {node.outputs[0]: made}
    y = walk.whole(second)
    if x.width != y.width:
        raise NotExpressibleError("it adds rows of two sizes")
    walk.add(Add(x.buffer, y.buffer, made.buffer, x.width))
    return {node.outputs[0]: made}


def sigmoid(walk: Walk, node: ir.Node) -> Results:
    return {node.outputs[0]: Sigmoid(walk.row(node.inputs[0]))}


def silu(walk: Walk, node: ir.Node) -> Results:
    if real(node, "alpha", 1.702 if node.op_type == "QuickGelu" else 1.0) != 1.0:
        raise NotExpressibleError(f"it computes {node.op_type}")
    return {node.outputs[0]: Silu(walk.row(node.inputs[0]))}


def mul(walk: Walk, node: ir.Node) -> Results:
    first, second = (walk.known(value) for value in node.inputs)
    if isinstance(first, Sigmoid) or isinstance(second, Silu):
        first, second = second, first
    match first, second:
        case (Lost(), _):
            raise NotExpressibleError(first.reason)
        case (_, Lost()):
            raise NotExpressibleError(second.reason)
        case (Row(), Sigmoid(of)) if of == first:
            return {node.outputs[0]: Silu(first)}
        case (Row(), Sigmoid(of)) if of.width == 1 and first.is_whole and of.is_whole:
            made = walk.buffer(first.width)
            walk.add(ScaleRows(first.buffer, of.buffer, made.buffer, first.width))
            return {node.outputs[0]: made}
        case (Silu(gate), Row()) if gate.width == second.width:
            return {node.outputs[0]: _swiglu(walk, gate, second)}
        case (Row(), None) if (factor := scalar(node.inputs[1])) is not None:
            return {node.outputs[0]: scaled(walk, first, factor)}
        case (None, Row()) if (factor := scalar(node.inputs[0])) is not None:
            return {node.outputs[0]: scaled(walk, second, factor)}
    raise NotExpressibleError("it multiplies rows")


def _swiglu(walk: Walk, gate: Row, up: Row) -> Row:
    made, width = walk.buffer(gate.width), gate.width
    if gate.is_whole and up.is_whole:
        walk.add(SwiGlu(gate.buffer, made.buffer, width, y=up.buffer))
        return made
    halves = gate.offset == 0 and up.offset == width and gate.whole == 2 * width
    if gate.buffer != up.buffer or not halves:
        raise NotExpressibleError("it gates parts of a product that are no halves")
    walk.add(SwiGlu(gate.buffer, made.buffer, width))
    return made


def norm(walk: Walk, node: ir.Node) -> Results:
    if integer(node, "axis", -1) not in (-1, len(sizes(node.inputs[0])) - 1):
        raise NotExpressibleError(f"it computes {node.op_type} along another axis")
    return {node.outputs[0]: _normed(walk, node, walk.row(node.inputs[0]), node.inputs[1])}


def skip_norm(walk: Walk, node: ir.Node) -> Results:
    if argument(node, 3) is not None:
        raise NotExpressibleError(f"its {node.op_type} adds a bias")
    x, skip = (walk.whole(value) for value in node.inputs[:2])
    total = walk.buffer(x.width)
    walk.add(Add(skip.buffer, x.buffer, total.buffer, x.width))
    results: dict[ir.Value, Known] = {node.outputs[0]: _normed(walk, node, total, node.inputs[2])}
    if len(node.outputs) > 3:
        results[node.outputs[3]] = total
    return results


def _normed(walk: Walk, node: ir.Node, x: Row, weight: ir.Value | None) -> Row:
    name, shape = weight_name(weight), sizes(past_casts(weight))
    size = shape[0] if len(shape) == 1 else None
    if name is None or not size or x.width % size:
        raise NotExpressibleError("its norm has no weight of one row")
    made = walk.buffer(x.width)
    walk.add(
        RmsNorm(
            x.buffer,
            name,
            real(node, "epsilon", 1e-5),
            made.buffer,
            x.width,
            size=None if size == x.width else size,
            x_offset=None if x.is_whole else x.offset,
        )
    )
    return made
