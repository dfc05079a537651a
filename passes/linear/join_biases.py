"""Add biases before a joined product is split, not to each of its parts."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from alloc_moe.passes.linear.joining import is_own, joined


class JoinBiasesPass(ir.passes.InPlacePass):
    """Replace ``Split`` whose parts all get a bias by ``Add`` of all biases, then ``Split``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_biased_splits(model))
        for split, adds in found:
            _join(model, split, adds)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [[add.name for add in adds] for _, adds in _biased_splits(model)]
        if left:
            raise ir.passes.PostconditionError(f"The biases {left} could be one each.")


def _biased_splits(model: ir.Model) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
    for node in model.graph:
        if node.op_type != "Split" or len(node.inputs) < 2:
            continue
        adds = [_bias_added(part) for part in node.outputs]
        found = [add for add in adds if add is not None]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        shape = None if node.inputs[0] is None else node.inputs[0].shape
        last = shape is not None and axis in (-1, len(shape) - 1)
        if last and len(found) == len(adds):
            yield node, found


def _bias_added(part: ir.Value) -> ir.Node | None:
    """Return the node that adds a bias to a part and is all that reads it."""
    users = list(part.consumers())
    if len(users) != 1 or users[0].op_type != "Add" or users[0].outputs[0].is_graph_output():
        return None
    bias, width = _bias(users[0], part), part.shape[-1] if part.shape else None
    fits = bias is not None and bias.shape is not None and list(bias.shape) == [width]
    return users[0] if fits and is_own(bias) else None


def _bias(add: ir.Node, part: ir.Value) -> ir.Value | None:
    """Return what a node adds to a part."""
    return add.inputs[1] if add.inputs[0] is part else add.inputs[0]


def _join(model: ir.Model, split: ir.Node, adds: list[ir.Node]) -> None:
    pairs = zip(adds, split.outputs, strict=True)
    biases = [_bias(add, part) for add, part in pairs]
    product = split.inputs[0]
    assert product is not None
    biased = ir.node(
        "Add", [product, joined(model, biases)], name=f"{split.name or product.name}.biases"
    )
    value = biased.outputs[0]
    value.name, value.type, value.shape = f"{product.name}.biased", product.type, product.shape
    model.graph.insert_before(split, biased)
    split.replace_input_with(0, value)
    for add, part in zip(adds, split.outputs, strict=True):
        ir.convenience.replace_all_uses_with(add.outputs[0], part)
        model.graph.remove(add, safe=True)
