"""Products with constant weights, and embeddings."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from alloc_moe.passes.step.matching import (
    NotExpressibleError,
    argument,
    block_format,
    integer,
    matrix,
    sizes,
    weight_name,
)
from alloc_moe.passes.step.parts import Format
from alloc_moe.passes.step.records import Embed, Linear
from alloc_moe.passes.step.state import Results, Row, Walk

EMBEDDINGS = ("Gather", "GatherBlockQuantized")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight [n, k] and how it is quantised."""

    name: str
    n: int
    k: int
    bias: str | None
    format: Format | None


def product_weight(node: ir.Node) -> Weight:
    """Return the weight, and the bias, of a node that multiplies its first input.

    Raises:
        NotExpressibleError: It isn't a constant [n, k].
    """
    if node.op_type == "MatMulNBits":
        name, form = weight_name(node.inputs[1]), block_format(node, 2, 3, 4)
        bias = argument(node, 5)
        found = None if name is None else (name, integer(node, "N", 0), integer(node, "K", 0))
    else:
        form, found = None, matrix(node)
        bias = argument(node, 2) if node.op_type == "Gemm" else None
    if found is None:
        raise NotExpressibleError("it multiplies by something else than a weight [N, K]")
    given = None if bias is None else weight_name(bias)
    if bias is not None and (given is None or list(sizes(bias)) != [found[1]]):
        raise NotExpressibleError("a product adds something else than a bias of one row")
    return Weight(*found, given, form)


def is_embedding(node: ir.Node) -> bool:
    """Whether a node looks the new tokens up in a table."""
    ids = argument(node, 1)
    given = ids is not None and ids.is_graph_input() and ids.name == "input_ids"
    return given and node.op_type in EMBEDDINGS


def visit(walk: Walk, node: ir.Node) -> Results:
    """Write a product down."""
    x, weight = walk.row(node.inputs[0]), product_weight(node)
    if x.width != weight.k:
        raise NotExpressibleError("it multiplies heads one by one")
    made = walk.buffer(weight.n)
    walk.add(
        Linear(
            x.buffer,
            weight.name,
            made.buffer,
            weight.n,
            weight.k,
            bias=weight.bias,
            format=weight.format,
            x_offset=None if x.is_whole else x.offset,
        )
    )
    return {node.outputs[0]: made}


def embed(walk: Walk, node: ir.Node) -> Results:
    """Write an embedding down."""
    name, shape = weight_name(node.inputs[0]), sizes(node.inputs[0])
    packed = node.op_type == "GatherBlockQuantized"
    rows = integer(node, "gather_axis" if packed else "axis", 0) == 0
    width = shape[1] if len(shape) == 2 else None
    if not is_embedding(node) or name is None or not width or not rows:
        raise NotExpressibleError(f"it computes {node.op_type}")
    form = None
    if packed:
        form = block_format(node, 2, 3)
        width = width * 8 // form.bits
    made = walk.buffer(width)
    walk.add(Embed(name, made.buffer, width, format=form))
    return {node.outputs[0]: made}


def scaled(walk: Walk, x: Row, factor: float) -> Row:
    """Write down that an embedding is multiplied by a number; nothing else is.

    Raises:
        NotExpressibleError: `x` is no embedding.
    """
    op = walk.ops[-1]
    if not isinstance(op, Embed) or op.out != x.buffer:
        raise NotExpressibleError("it multiplies rows by a number")
    made = walk.buffer(x.width)
    walk.add(dataclasses.replace(op, out=made.buffer, scale=(op.scale or 1.0) * factor))
    return made
