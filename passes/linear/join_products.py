"""Compute products with one input, as those to queries, keys and values, in one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT
from alloc_moe.passes.linear.joining import is_own, joined, replace_by_parts
from alloc_moe.passes.linear.untransposed import FUSED_MATMUL

_MULTIPLE = 8  # rows of a weight: products of other sizes are slow on CUDA


class JoinProductsPass(ir.passes.InPlacePass):
    """Join FusedMatMul nodes that have one input: one node with all rows, then Split.

    `JoinBiasesPass` does the same with the biases that follow them.
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
        if values is None or weight is None or not is_own(weight):
            continue
        rows = weight.shape[0] if weight.shape else None
        if (
            isinstance(rows, int)
            and rows % _MULTIPLE == 0
            and not node.outputs[0].is_graph_output()
        ):
            found[values].append(node)
    yield from (nodes for nodes in found.values() if len(nodes) > 1)


def _join(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    weights = [node.inputs[1] for node in nodes]
    rows = [int(value.shape[0]) for value in weights if value and value.shape]  # type: ignore[arg-type]
    product = ir.node(
        FUSED_MATMUL,
        [first.inputs[0], joined(model, weights)],
        attributes={name: attribute.value for name, attribute in first.attributes.items()},
        domain=MICROSOFT,
        name="+".join(node.name or "" for node in nodes),
    )
    replace_by_parts(model, nodes, product, rows)
