"""Bring the experts' weights into the layout of onnxruntime's MoE operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import (
    DOWN,
    GATE_UP,
    GATE_UP_BIAS,
    add_initializer,
    lazy_tensor,
    routed_experts,
)


class InterleaveExpertsPass(ir.passes.InPlacePass):
    """Interleave gate and up rows (gate 0, up 0, gate 1, ...) and undo a transposed layout.

    onnxruntime's CPU kernel takes SwiGLU weights interleaved only (``swiglu_fusion=1``), as
    [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]. Done once, when the
    weights are written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in routed_experts(model):
            transposed = bool(node.attributes["transposed"].as_int())
            interleaved = bool(node.attributes["interleaved"].as_int())
            if interleaved and not transposed:
                continue
            _rewrite(model, node, GATE_UP, transposed=transposed, interleave=not interleaved)
            if node.inputs[GATE_UP_BIAS] is not None:
                _rewrite(model, node, GATE_UP_BIAS, transposed=False, interleave=not interleaved)
            if transposed:
                _rewrite(model, node, DOWN, transposed=True, interleave=False)
            node.attributes["transposed"] = ir.AttrInt64("transposed", 0)
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in routed_experts(model):
            if (
                node.attributes["transposed"].as_int()
                or not node.attributes["interleaved"].as_int()
            ):
                raise ir.passes.PostconditionError(
                    f"The experts of {node.name} are not interleaved."
                )


def interleave_rows(weights: np.ndarray) -> np.ndarray:
    """Return [E, 2I, ...] with row i of the first half followed by row i of the second."""
    experts, rows = weights.shape[:2]
    halves = weights.reshape(experts, 2, rows // 2, *weights.shape[2:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


def _rewrite(
    model: ir.Model, node: ir.Node, index: int, *, transposed: bool, interleave: bool
) -> None:
    source = node.inputs[index]
    if source is None or source.const_value is None:
        raise ir.passes.PreconditionError(
            f"Input {index} of {node.name} is no initializer, so it can't be laid out offline."
        )
    tensor = source.const_value
    shape = tensor.shape.numpy()
    if transposed:
        shape = (shape[0], shape[2], shape[1])

    def compute() -> np.ndarray:
        weights = tensor.numpy()
        if transposed:
            weights = np.ascontiguousarray(weights.swapaxes(1, 2))
        return interleave_rows(weights) if interleave else weights

    name = f"{source.name}.moe"
    value = model.graph.initializers.get(name)
    if value is None:
        value = add_initializer(model, lazy_tensor(compute, shape, tensor.dtype, name))
    node.replace_input_with(index, value)
