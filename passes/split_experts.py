"""Store wide quantised experts as halves, which divide evenly among threads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import (
    DOWN,
    DOWN_BIAS,
    GATE_UP,
    GATE_UP_BIAS,
    add_initializer,
    lazy_tensor,
    routed_experts,
)
from alloc_moe.passes.quantize_experts import DOWN_SCALES, GATE_UP_SCALES, expert_format

PARTS = 2
LEAST_WIDTH = 256
"""Of a part: with less to compute, what a part costs by itself outweighs the balance."""


class SplitExpertsPass(ir.passes.InPlacePass):
    """Turn the E quantised experts of a layer into `PARTS` * E of a part of their width each.

    Part p of expert e is number p * E + e; the parts' outputs add up to the expert's, as each has
    its own rows of ``gate_up`` and columns of ``down``. onnxruntime's CPU QMoE gives every thread
    whole experts: three on two threads take as long as four, and a budget in the mean over tokens
    leaves a single one with an odd number half of the time. Halves divide evenly. The number of
    bytes stays the same, and so do all values.

    Runs after the experts are quantised and corrected. Layers whose width blocks don't divide
    evenly stay as they are.

    Args:
        least_width: The least intermediate size that a part may have.
    """

    def __init__(self, least_width: int = LEAST_WIDTH) -> None:
        super().__init__()
        self._least_width = least_width

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in routed_experts(model):
            if expert_parts(node) == 1 and self._divides(node):
                _split(model, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def _divides(self, node: ir.Node) -> bool:
        form = expert_format(node)
        if form is None:
            return False
        width = _shape(node.inputs[GATE_UP])[1] // 2
        return width % (PARTS * form.block) == 0 and width // PARTS >= self._least_width


def expert_parts(node: ir.Node) -> int:
    """Return into how many parts a RoutedExperts node has its experts divided."""
    return node.attributes["parts"].as_int() if "parts" in node.attributes else 1


def _split(model: ir.Model, node: ir.Node) -> None:
    for index in (GATE_UP, GATE_UP_SCALES, GATE_UP_BIAS):
        _rearrange(model, node, index, axis=1)
    for index in (DOWN, DOWN_SCALES):
        _rearrange(model, node, index, axis=2)
    _pad_bias(model, node)
    node.attributes["parts"] = ir.AttrInt64("parts", PARTS)


def _rearrange(model: ir.Model, node: ir.Node, index: int, *, axis: int) -> None:
    """Divide an input [E, ...] along an axis into [PARTS * E, ...]."""
    source = node.inputs[index]
    if source is None:
        return
    tensor = _tensor(node, source)
    shape = list(tensor.shape.numpy())
    shape[axis] //= PARTS
    shape[0] *= PARTS

    def compute() -> np.ndarray:
        return np.concatenate(np.split(tensor.numpy(), PARTS, axis=axis))

    name = f"{source.name}.parts"
    node.replace_input_with(
        index, add_initializer(model, lazy_tensor(compute, shape, tensor.dtype, name))
    )


def _pad_bias(model: ir.Model, node: ir.Node) -> None:
    """Give the bias of ``down`` [E, H] to the first part alone."""
    source = node.inputs[DOWN_BIAS]
    if source is None:
        return
    tensor = _tensor(node, source)
    experts, hidden = tensor.shape.numpy()

    def compute() -> np.ndarray:
        bias = tensor.numpy()
        return np.concatenate([bias, *[np.zeros_like(bias)] * (PARTS - 1)])

    made = lazy_tensor(compute, (PARTS * experts, hidden), tensor.dtype, f"{source.name}.parts")
    node.replace_input_with(DOWN_BIAS, add_initializer(model, made))


def _tensor(node: ir.Node, value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ir.passes.PreconditionError(
            f"{value.name} of {node.name} is no initializer, so it can't be divided."
        )
    return value.const_value


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None
    return tuple(value.shape.numpy())
