"""Transpose weights when they are written instead of whenever the graph runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import add_initializer, lazy_tensor


class FoldTransposesPass(ir.passes.InPlacePass):
    """Replace ``Transpose(initializer)`` by a transposed initializer, lazily.

    The optimizer's constant folding would hold a second copy of every weight in memory.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node, weight in list(_transposed_weights(model)):
            folded = _transposed(model, weight, node.attributes.get("perm"))
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        left = [weight.name for _, weight in _transposed_weights(model)]
        if left:
            raise ir.passes.PostconditionError(
                f"The weights {left} are still transposed at run time."
            )


def _transposed_weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        if node.op_type == "Transpose" and node.domain in ("", "ai.onnx"):
            source = node.inputs[0]
            if source is not None and source.is_initializer() and source.const_value is not None:
                yield node, source


def _transposed(model: ir.Model, weight: ir.Value, attribute: ir.Attr | None) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    sizes = tensor.shape.numpy()
    perm = attribute.as_ints() if attribute is not None else tuple(reversed(range(len(sizes))))
    name = f"{weight.name}.transposed.{''.join(map(str, perm))}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    shape = [sizes[axis] for axis in perm]

    def compute() -> np.ndarray:
        return np.ascontiguousarray(tensor.numpy().transpose(perm))

    return add_initializer(model, lazy_tensor(compute, shape, tensor.dtype, name))
