"""Store the experts' weights in 4 or 8 bits, one scale per block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import DOWN, GATE_UP, add_initializer, lazy_parts, routed_experts
from alloc_moe.passes.blockwise import BlockFormat, quantize

GATE_UP_SCALES, DOWN_SCALES = 7, 8
"""Inputs that a RoutedExperts node has in addition once its weights are quantised."""


class QuantizeExpertsPass(ir.passes.InPlacePass):
    """Quantise ``gate_up`` and ``down`` of RoutedExperts nodes when they are written.

    The node gets the scales as two more inputs, and the attributes ``bits`` and ``block``. Runs
    after the experts are laid out; biases stay as they are.

    Args:
        formats: By MoE layer; layers not listed stay as they are.
    """

    def __init__(self, formats: Mapping[int, BlockFormat]) -> None:
        super().__init__()
        self._formats = formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in routed_experts(model):
            form = self._formats.get(node.attributes["layer"].as_int())
            if form is None or expert_format(node) is not None:
                continue
            node.resize_inputs(DOWN_SCALES + 1)
            for weight, scales in ((GATE_UP, GATE_UP_SCALES), (DOWN, DOWN_SCALES)):
                _quantize(model, node, weight, scales, form)
            node.attributes["bits"] = ir.AttrInt64("bits", form.bits)
            node.attributes["block"] = ir.AttrInt64("block", form.block)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in routed_experts(model):
            wanted = self._formats.get(node.attributes["layer"].as_int())
            if wanted is not None and expert_format(node) != wanted:
                raise ir.passes.PostconditionError(
                    f"The experts of {node.name} are {expert_format(node)}, not {wanted}."
                )


def expert_format(node: ir.Node) -> BlockFormat | None:
    """Return how a RoutedExperts node stores its weights, None for floats."""
    if "bits" not in node.attributes:
        return None
    return BlockFormat(node.attributes["bits"].as_int(), node.attributes["block"].as_int())


def _quantize(model: ir.Model, node: ir.Node, weight: int, scales: int, form: BlockFormat) -> None:
    source = node.inputs[weight]
    assert source is not None
    tensor = source.const_value
    if tensor is None:
        raise ir.passes.PreconditionError(
            f"Input {weight} of {node.name} is no initializer, so it can't be quantised."
        )
    experts, rows, columns = tensor.shape.numpy()
    if columns % form.block:
        raise ir.passes.PreconditionError(
            f"{source.name} has rows of {columns}, which blocks of {form.block} don't divide."
        )
    dtype = tensor.dtype.numpy()

    def compute() -> tuple[np.ndarray, np.ndarray]:
        packed, factors = quantize(tensor.numpy(), form)
        return packed, factors.astype(dtype)

    name = f"{source.name}.int{form.bits}"
    specifications = [
        (name, (experts, rows, form.packed_columns(columns)), ir.DataType.UINT8),
        (f"{name}.scales", (experts, rows, columns // form.block), tensor.dtype),
    ]
    for index, part in zip((weight, scales), lazy_parts(compute, specifications), strict=True):
        node.replace_input_with(index, add_initializer(model, part))
