"""Compute projections of the same values, as those to queries, keys and values, in one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT
from alloc_moe.passes.linear.joining import is_own, joined, replace_by_parts

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
        if set(given) <= set(_JOINED) and all(is_own(node.inputs[at]) for at in given):
            form = {name: node.attributes[name].value for name in node.attributes if name != "N"}
            found[node.inputs[0], given, *sorted(form.items())].append(node)
    yield from (nodes for nodes in found.values() if len(nodes) > 1)


def _fuse(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    rows = [node.attributes["N"].as_int() for node in nodes]
    inputs = list(first.inputs)
    for at in range(1, len(inputs)):
        if inputs[at] is not None:
            inputs[at] = joined(model, [node.inputs[at] for node in nodes])
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    fused = ir.node(
        first.op_type,
        inputs,
        attributes={**attributes, "N": sum(rows)},
        domain=MICROSOFT,
        name="+".join(node.name or "" for node in nodes),
    )
    replace_by_parts(model, nodes, fused, rows)
