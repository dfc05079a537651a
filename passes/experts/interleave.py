"""Bring the experts' weights into the layout of onnxruntime's MoE operator."""

from __future__ import annotations

from collections.abc import Callable

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

    Experts without a gate have their up rows for both: each becomes two.

    onnxruntime's CPU kernel takes SwiGLU weights interleaved only (``swiglu_fusion=1``), as
    [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]. Done once, when the
    weights are written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in routed_experts(model):
            transposed = bool(node.attributes["transposed"].as_int())
            interleaved = bool(node.attributes["interleaved"].as_int())
            gated = bool(node.attributes.get_int("gated", 1))
            if interleaved and gated and not transposed:
                continue
            arrange = _as_stored if interleaved else interleave_rows
            arrange = arrange if gated else repeat_rows
            _rewrite(model, node, GATE_UP, arrange, transposed=transposed)
            if node.inputs[GATE_UP_BIAS] is not None:
                _rewrite(model, node, GATE_UP_BIAS, arrange, transposed=False)
            if transposed:
                _rewrite(model, node, DOWN, _as_stored, transposed=True)
            node.attributes["gated"] = ir.AttrInt64("gated", 1)
            node.attributes["transposed"] = ir.AttrInt64("transposed", 0)
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in routed_experts(model):
            if (
                node.attributes["transposed"].as_int()
                or not node.attributes["interleaved"].as_int()
                or not node.attributes.get_int("gated", 1)
            ):
                raise ir.passes.PostconditionError(
                    f"The experts of {node.name} are not interleaved."
                )


def interleave_rows(weights: np.ndarray) -> np.ndarray:
    """Return [E, 2I, ...] with row i of the first half followed by row i of the second."""
    experts, rows = weights.shape[:2]
    halves = weights.reshape(experts, 2, rows // 2, *weights.shape[2:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


def repeat_rows(weights: np.ndarray) -> np.ndarray:
    """Return [E, 2I, ...] with each row of [E, I, ...] twice in a row."""
    return np.repeat(weights, 2, axis=1)


def _as_stored(weights: np.ndarray) -> np.ndarray:
    return weights


def _rewrite(
    model: ir.Model,
    node: ir.Node,
    index: int,
    arrange: Callable[[np.ndarray], np.ndarray],
    *,
    transposed: bool,
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
    if arrange is repeat_rows:
        shape = (shape[0], 2 * shape[1], *shape[2:])

    def compute() -> np.ndarray:
        weights = tensor.numpy()
        if transposed:
            weights = np.ascontiguousarray(weights.swapaxes(1, 2))
        return arrange(weights)

    name = f"{source.name}.moe"
    value = model.graph.initializers.get(name)
    if value is None:
        value = add_initializer(model, lazy_tensor(compute, shape, tensor.dtype, name))
    node.replace_input_with(index, value)
