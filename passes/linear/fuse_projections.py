"""Compute projections of the same values, as those to queries, keys and values, in one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT, add_initializer, lazy_tensor

_JOINED = (1, 2, 5)
"""Inputs of MatMulNBits that have a row per output: packed weights, scales, biases."""


class FuseProjectionsPass(ir.passes.InPlacePass):
    """Join MatMulNBits nodes that have one input and format: one node with all rows, then Split.

    A decode step reads one long weight faster than several short ones, and runs fewer nodes. The
    weights stay lazy: the parts of one are in memory together while it is written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = list(_groups(model))
        for nodes in groups:
            _fuse(model, nodes)
        return ir.passes.PassResult(model, modified=bool(groups))

    def ensures(self, model: ir.Model) -> None:
        left = [[node.name for node in nodes] for nodes in _groups(model)]
        if left:
            raise ir.passes.PostconditionError(f"The projections {left} could be one each.")


def _groups(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Yield projections of the same values that no other node shares its weights with."""
    found: dict[Hashable, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.domain != MICROSOFT or node.op_type != "MatMulNBits":
            continue
        given = tuple(at for at, value in enumerate(node.inputs) if at and value is not None)
        if set(given) <= set(_JOINED) and all(map(_is_own, node.inputs[1:])):
            form = {name: node.attributes[name].value for name in node.attributes if name != "N"}
            found[node.inputs[0], given, *sorted(form.items())].append(node)
    yield from (nodes for nodes in found.values() if len(nodes) > 1)


def _is_own(value: ir.Value | None) -> bool:
    """Whether no other node reads a weight."""
    return value is None or (value.is_initializer() and len(value.uses()) == 1)


def _fuse(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    rows = [node.attributes["N"].as_int() for node in nodes]
    inputs = list(first.inputs)
    for at in range(1, len(inputs)):
        if inputs[at] is not None:
            inputs[at] = _joined(model, nodes, at)
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    fused = ir.node(
        first.op_type,
        inputs,
        attributes={**attributes, "N": sum(rows)},
        domain=MICROSOFT,
        name="+".join(node.name or "" for node in nodes),
    )
    product, result = fused.outputs[0], first.outputs[0]
    product.name, product.type = f"{result.name}.joined", result.type
    if result.shape is not None:
        product.shape = ir.Shape([*result.shape[:-1], sum(rows)])
    sizes = ir.tensor(np.array(rows, np.int64), name=f"{product.name}.rows")
    split = ir.node(
        "Split",
        [product, add_initializer(model, sizes)],
        attributes={"axis": -1},
        num_outputs=len(nodes),
    )
    model.graph.insert_before(first, [fused, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.name, part.type, part.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
        model.graph.remove(node, safe=True)


def _joined(model: ir.Model, nodes: Sequence[ir.Node], at: int) -> ir.Value:
    """Return one input of the nodes, row below row."""
    values = [node.inputs[at] for node in nodes]
    tensors = [value.const_value for value in values if value and value.const_value]
    assert len(tensors) == len(nodes)
    sizes = [tensor.shape.numpy() for tensor in tensors]
    shape = (sum(size[0] for size in sizes), *sizes[0][1:])

    def compute() -> np.ndarray:
        return np.concatenate([tensor.numpy() for tensor in tensors])

    name = "+".join(tensor.name or "" for tensor in tensors)
    return add_initializer(model, lazy_tensor(compute, shape, tensors[0].dtype, name))
