"""Add to the residual stream and normalise the sum in one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # all that CPU and CUDA kernels both take
_RANKS = (2, 3)
_SUM = 3  # which output of the fused operator is the sum


class FuseNormsPass(ir.passes.InPlacePass):
    """Turn ``RMSNormalization(a + b)`` into ``SkipSimplifiedLayerNormalization(a, b)``.

    Whatever else reads the sum reads an output of the new node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_normalized_sums(model))
        for add, norm in found:
            _fuse(model, add, norm)
        if found:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [norm.name for _, norm in _normalized_sums(model)]
        if left:
            raise ir.passes.PostconditionError(f"The sums before {left} are nodes of their own.")


def _normalized_sums(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yield additions and the normalisations of their sums, no sum twice."""
    seen = set()
    for norm in model.graph:
        if norm.op_type != "RMSNormalization" or norm.domain not in ("", "ai.onnx"):
            continue
        total = norm.inputs[0]
        add = None if total is None else total.producer()
        if add is None or add.op_type != "Add" or add in seen or not _fits(add, norm):
            continue
        seen.add(add)
        yield add, norm


def _fits(add: ir.Node, norm: ir.Node) -> bool:
    """Whether the operator takes these: equal shapes, all of the last axis, and the type."""
    total, weight = norm.inputs[:2]
    values = [*add.inputs, total]
    shapes = [None if value is None else value.shape for value in values]
    if any(shape is None or len(shape) not in _RANKS or shape != shapes[0] for shape in shapes):
        return False
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    assert total is not None
    assert weight is not None
    last = axis in (-1, len(total.shape or ()) - 1)
    alike = weight.is_initializer() and weight.dtype == total.dtype and total.dtype in _TYPES
    return last and alike and not total.is_graph_output()


def _fuse(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    epsilon = norm.attributes.get("epsilon")
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        attributes={} if epsilon is None else {"epsilon": epsilon.as_float()},
        domain=MICROSOFT,
        num_outputs=_SUM + 1,
        name=norm.name,
    )
    model.graph.insert_after(add, fused)
    for node, output in ((norm, 0), (add, _SUM)):
        old, new = node.outputs[0], fused.outputs[output]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    for unused in fused.outputs[1:_SUM]:
        unused.name = ""
    if not fused.outputs[_SUM].uses():
        fused.resize_outputs(1)
