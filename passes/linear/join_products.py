"""Compute products with one input, as those to queries, keys and values, in one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT, add_initializer, lazy_tensor
from alloc_moe.passes.linear.untransposed import FUSED_MATMUL

_MULTIPLE = 8  # rows of a weight: products of other sizes are slow on CUDA


class JoinProductsPass(ir.passes.InPlacePass):
    """Join FusedMatMul nodes that have one input: one node with all rows, then Split.

    So are biases that all of them are followed by. The weights stay lazy: the parts of one are in
    memory together while it is written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = list(_groups(model))
        for nodes in groups:
            _join(model, nodes)
        return ir.passes.PassResult(model, modified=bool(groups))

    def ensures(self, model: ir.Model) -> None:
        left = [[node.name for node in nodes] for nodes in _groups(model)]
        if left:
            raise ir.passes.PostconditionError(f"The products {left} could be one each.")


def _groups(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Yield products of the same values by weights that nothing else reads."""
    found: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.domain != MICROSOFT or node.op_type != FUSED_MATMUL:
            continue
        values, weight = node.inputs[:2]
        if values is None or weight is None or not _is_own(weight):
            continue
        rows = weight.shape[0] if weight.shape else None
        if (
            isinstance(rows, int)
            and rows % _MULTIPLE == 0
            and not node.outputs[0].is_graph_output()
        ):
            found[values].append(node)
    yield from (nodes for nodes in found.values() if len(nodes) > 1)


def _is_own(value: ir.Value) -> bool:
    """Whether no other node reads a weight."""
    return value.is_initializer() and not value.is_graph_input() and len(value.uses()) == 1


def _join(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    weights = [node.inputs[1] for node in nodes]
    rows = [int(value.shape[0]) for value in weights if value and value.shape]  # type: ignore[arg-type]
    product = ir.node(
        FUSED_MATMUL,
        [first.inputs[0], _joined(model, weights)],
        attributes={name: attribute.value for name, attribute in first.attributes.items()},
        domain=MICROSOFT,
        name="+".join(node.name or "" for node in nodes),
    )
    last = product
    made = [product]
    parts = [node.outputs[0] for node in nodes]
    if all(added := [_bias_added(part) for part in parts]):
        biases = [add.inputs[_bias_at(add)] for add in added if add is not None]
        last = ir.node("Add", [product.outputs[0], _joined(model, biases)])
        made.append(last)
        parts = [add.outputs[0] for add in added if add is not None]
    for node in made:
        value, like = node.outputs[0], parts[0]
        value.name = f"{first.outputs[0].name}.{node.op_type}.joined"
        value.type = like.type
        if like.shape is not None:
            value.shape = ir.Shape([*like.shape[:-1], sum(rows)])
    sizes = ir.tensor(np.array(rows, np.int64), name=f"{last.outputs[0].name}.rows")
    split = ir.node(
        "Split",
        [last.outputs[0], add_initializer(model, sizes)],
        attributes={"axis": -1},
        num_outputs=len(nodes),
    )
    model.graph.insert_before(first, [*made, split])
    for old, new in zip(parts, split.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
        replaced = old.producer()
        assert replaced is not None
        model.graph.remove(replaced, safe=True)
    for node in nodes:
        if node.graph is not None:
            model.graph.remove(node, safe=True)


def _bias_added(value: ir.Value) -> ir.Node | None:
    """Return the node that adds a bias to a product and is all that reads it."""
    users = list(value.consumers())
    if len(users) != 1 or users[0].op_type != "Add" or users[0].outputs[0].is_graph_output():
        return None
    bias = users[0].inputs[_bias_at(users[0])]
    own = bias is not None and _is_own(bias) and bias.shape is not None and len(bias.shape) == 1
    return users[0] if own else None


def _bias_at(add: ir.Node) -> int:
    second = add.inputs[1]
    return 1 if second is not None and second.is_initializer() else 0


def _joined(model: ir.Model, values: Sequence[ir.Value | None]) -> ir.Value:
    """Return weights, or biases, row below row."""
    tensors = [value.const_value for value in values if value and value.const_value]
    assert len(tensors) == len(values)
    sizes = [tensor.shape.numpy() for tensor in tensors]
    shape = (sum(size[0] for size in sizes), *sizes[0][1:])

    def compute() -> np.ndarray:
        return np.concatenate([tensor.numpy() for tensor in tensors])

    name = "+".join(tensor.name or "" for tensor in tensors)
    return add_initializer(model, lazy_tensor(compute, shape, tensors[0].dtype, name))
