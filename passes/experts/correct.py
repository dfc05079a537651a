"""Fold corrections into the experts' weights: nothing is added to what runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import DOWN, DOWN_BIAS, add_initializer, lazy_tensor, routed_experts
from alloc_moe.passes.experts.quantize import DOWN_SCALES, expert_format


@dataclass(frozen=True, eq=False)
class ExpertCorrection:
    """Expert e shall give ``scale * f_e(x) + bias[e]`` where it gave f_e(x)."""

    scale: np.ndarray  # [hidden] float32
    bias: np.ndarray | None  # [experts, hidden] float32


class CorrectExpertsPass(ir.passes.InPlacePass):
    """Scale the rows of ``down`` and add to its bias, which is made where there is none.

    Runs before the experts are lowered, and after they are laid out: ``down`` is [E, H, I]; if they
    are quantised, its scales are [E, H, blocks].

    Args:
        corrections: By MoE layer; layers not listed stay as they are.
    """

    def __init__(self, corrections: Mapping[int, ExpertCorrection]) -> None:
        super().__init__()
        self._corrections = corrections

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in routed_experts(model):
            correction = self._corrections.get(node.attributes["layer"].as_int())
            if correction is not None:
                _correct(model, node, correction)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _correct(model: ir.Model, node: ir.Node, correction: ExpertCorrection) -> None:
    # Quantised weights keep their values: the scales of a row take its factor.
    index = DOWN if expert_format(node) is None else DOWN_SCALES
    down = node.inputs[index]
    assert down is not None
    tensor = down.const_value
    if tensor is None:
        raise ir.passes.PreconditionError(
            f"The down projection of {node.name} is no initializer, so it can't be corrected."
        )
    rows = correction.scale[:, None]
    name = f"{down.name}.corrected"
    scaled = lazy_tensor(
        lambda: _scaled(tensor.numpy(), rows), tensor.shape.numpy(), tensor.dtype, name
    )
    node.replace_input_with(index, add_initializer(model, scaled))
    bias = _corrected_bias(node, correction)
    if bias is None:
        return
    made = ir.Tensor(bias.astype(tensor.dtype.numpy()), name=f"{down.name}.bias.corrected")
    if len(node.inputs) <= DOWN_BIAS:
        node.resize_inputs(DOWN_BIAS + 1)
    node.replace_input_with(DOWN_BIAS, add_initializer(model, made))


def _corrected_bias(node: ir.Node, correction: ExpertCorrection) -> np.ndarray | None:
    """Return the bias [experts, hidden] that the corrected experts have, if any."""
    given = node.inputs[DOWN_BIAS] if len(node.inputs) > DOWN_BIAS else None
    if given is None:
        return correction.bias
    assert given.const_value is not None
    scaled = _scaled(given.const_value.numpy(), correction.scale)
    return scaled if correction.bias is None else scaled + correction.bias


def _scaled(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = (weights.astype(np.float32) * scale).astype(weights.dtype)
    return scaled
