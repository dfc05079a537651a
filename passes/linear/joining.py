"""Weights row below row, and products of them that are split again: what joining passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import add_initializer, lazy_tensor


def is_own(value: ir.Value | None) -> bool:
    """Whether a value is a weight that one node reads only."""
    if value is None or value.is_graph_input():
        return False
    return value.is_initializer() and len(value.uses()) == 1


def joined(model: ir.Model, values: Sequence[ir.Value | None]) -> ir.Value:
    """Return weights, or biases, row below row: lazily, all in memory while one is written."""
    tensors = [value.const_value for value in values if value and value.const_value]
    assert len(tensors) == len(values)
    sizes = [tensor.shape.numpy() for tensor in tensors]
    shape = (sum(size[0] for size in sizes), *sizes[0][1:])

    def compute() -> np.ndarray:
        return np.concatenate([tensor.numpy() for tensor in tensors])

    name = "+".join(tensor.name or "" for tensor in tensors)
    return add_initializer(model, lazy_tensor(compute, shape, tensors[0].dtype, name))


def replace_by_parts(
    model: ir.Model, nodes: Sequence[ir.Node], product: ir.Node, rows: Sequence[int]
) -> None:
    """Compute one product before the first of several, and give each one's users its part.

    Args:
        model: The model.
        nodes: What is replaced.
        product: What computes all of their outputs, side by side.
        rows: How many columns each of them gave.
    """
    value, result = product.outputs[0], nodes[0].outputs[0]
    value.name, value.type = f"{result.name}.joined", result.type
    if result.shape is not None:
        value.shape = ir.Shape([*result.shape[:-1], sum(rows)])
    sizes = ir.tensor(np.array(rows, np.int64), name=f"{value.name}.rows")
    split = ir.node(
        "Split",
        [value, add_initializer(model, sizes)],
        attributes={"axis": -1},
        num_outputs=len(nodes),
    )
    model.graph.insert_before(nodes[0], [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.name, part.type, part.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
        model.graph.remove(node, safe=True)
