"""Add what a layer computed and normalise the sum in one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT

SKIP_NORM = "SkipSimplifiedLayerNormalization"
SUM = 3
"""Which of its outputs is the sum."""


class SkipNormsPass(ir.passes.InPlacePass):
    """Replace ``RMSNormalization`` of a sum of two by one node that gives the sum too."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_sums_normalised(model))
        for add, norm in found:
            _fuse(model, add, norm)
        if found:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [norm.name for _, norm in _sums_normalised(model)]
        if left:
            raise ir.passes.PostconditionError(f"{left} normalise sums that are computed apart.")


def _sums_normalised(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    taken: set[ir.Node] = set()
    for norm in model.graph:
        if norm.op_type != "RMSNormalization" or norm.domain not in ("", "ai.onnx"):
            continue
        value, weight = norm.inputs[:2]
        add = None if value is None else value.producer()
        if add is None or add.op_type != "Add" or add in taken or weight is None:
            continue
        axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
        plain = value is not None and not value.is_graph_output() and weight.dtype == value.dtype
        if axis == -1 and plain and _are_alike(add):
            taken.add(add)
            yield add, norm


def _are_alike(add: ir.Node) -> bool:
    """Whether both sides and the sum have one shape of three dimensions: none repeats."""
    shapes = [value.shape for value in (*add.inputs, *add.outputs) if value is not None]
    known = {tuple(map(str, shape)) for shape in shapes if shape is not None and len(shape) == 3}
    return len(shapes) == 3 and len(known) == 1 and all(shape is not None for shape in shapes)


def _fuse(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    epsilon = norm.attributes.get("epsilon")
    fused = ir.node(
        SKIP_NORM,
        [*add.inputs, norm.inputs[1]],
        attributes={"epsilon": 1e-5 if epsilon is None else epsilon.as_float()},
        domain=MICROSOFT,
        num_outputs=SUM + 1,
        name=norm.name,
    )
    for unused in fused.outputs[1:SUM]:
        unused.name = ""
    # In the place of the sum, before all that reads it.
    model.graph.insert_before(add, fused)
    for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[SUM])):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove([norm, add], safe=True)
