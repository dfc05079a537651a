"""Transpose weights when they are written instead of whenever the graph runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import add_initializer, lazy_tensor


class FoldTransposesPass(ir.passes.InPlacePass):
    """Replace ``Transpose(initializer)`` by a transposed initializer, lazily.

    The optimizer's constant folding would hold a second copy of every weight in memory.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
                continue
            source = node.inputs[0]
            if source is None or not source.is_initializer() or source.const_value is None:
                continue
            folded = _transposed(model, source, _permutation(node, source))
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _permutation(node: ir.Node, source: ir.Value) -> tuple[int, ...]:
    attribute = node.attributes.get("perm")
    rank = len(source.const_value.shape)  # type: ignore[union-attr]
    return tuple(attribute.as_ints()) if attribute is not None else tuple(reversed(range(rank)))


def _transposed(model: ir.Model, source: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    name = f"{source.name}.transposed.{''.join(map(str, perm))}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = source.const_value
    assert tensor is not None
    sizes = tensor.shape.numpy()
    shape = tuple(sizes[axis] for axis in perm)

    def compute() -> np.ndarray:
        return np.ascontiguousarray(tensor.numpy().transpose(perm))

    return add_initializer(model, lazy_tensor(compute, shape, tensor.dtype, name))
