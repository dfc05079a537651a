"""Multiply by weights as checkpoints have them, [out, in], without a transposed copy."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT

FUSED_MATMUL = "FusedMatMul"
_REVERSED = (1, 0)


class UntransposedProductsPass(ir.passes.InPlacePass):
    """Turn ``MatMul(x, Transpose(weight))`` into ``FusedMatMul(x, weight, transB=1)``.

    For CUDA, whose products take either layout at the same speed: a tied head then shares the
    weight of the embedding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_products(model))
        for node, weight in found:
            product = ir.node(
                FUSED_MATMUL,
                [node.inputs[0], weight],
                attributes={"transB": 1},
                domain=MICROSOFT,
                name=node.name,
            )
            old, new = node.outputs[0], product.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            model.graph.insert_before(node, product)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
            model.graph.remove(node, safe=True)
            if transpose is not None and not transpose.outputs[0].uses():
                model.graph.remove(transpose, safe=True)
        if found:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [weight.name for _, weight in _products(model)]
        if left:
            raise ir.passes.PostconditionError(f"The weights {left} are still transposed.")


def _products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight, perm = transpose.inputs[0], transpose.attributes.get("perm")
        if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
            continue
        if perm is None or tuple(perm.as_ints()) == _REVERSED:
            yield node, weight
