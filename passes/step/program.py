"""Write the step program into the metadata of a graph, or why there is none."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from alloc_moe.passes.base import routed_experts
from alloc_moe.passes.experts.lower import Allocation
from alloc_moe.passes.step.fuse import fuse
from alloc_moe.passes.step.matching import NotExpressibleError
from alloc_moe.passes.step.records import (
    LOGITS,
    AddBias,
    Attention,
    Embed,
    Linear,
    Op,
    Reason,
    StepProgram,
)
from alloc_moe.passes.step.shared_keys import share_keys
from alloc_moe.passes.step.walk import walk_graph

STEP_KEY = "alloc_moe.step"
"""Key of the step program in the metadata."""
NO_STEP_KEY = "alloc_moe.no_step"
"""Key in the metadata of why there is no step program, as the end of a sentence."""
_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


class StepProgramPass(ir.passes.InPlacePass):
    """Derive the step program from the graph; what the graph computes stays as it is.

    Runs after what quantises and corrects experts, so that weights have their last names, and
    before they are lowered.

    Args:
        allocation: The plan's part that the graph depends on.
        positions: How many the model has, if that is known.
    """

    def __init__(self, allocation: Allocation, positions: int | None) -> None:
        super().__init__()
        self._allocation, self._positions = allocation, positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not any(routed_experts(model)):
            return ir.passes.PassResult(model, modified=False)
        program = step_program(model, self._allocation, self._positions)
        if isinstance(program, Reason):
            key, text, other = NO_STEP_KEY, program.text, STEP_KEY
        else:
            key, text, other = STEP_KEY, program.to_json(), NO_STEP_KEY
        modified = model.metadata_props.get(key) != text or other in model.metadata_props
        model.metadata_props.pop(other, None)
        model.metadata_props[key] = text
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        found = {STEP_KEY, NO_STEP_KEY}.intersection(model.metadata_props)
        if any(routed_experts(model)) and len(found) != 1:
            raise ir.passes.PostconditionError(
                f"The metadata have {sorted(found)}, not either a step program or the reason."
            )


def step_program(
    model: ir.Model, allocation: Allocation, positions: int | None
) -> StepProgram | Reason:
    """Return how a graph computes one new token of each sequence, or why that can't be said.

    Args:
        model: Its RoutedExperts nodes are not lowered yet, its weights are final.
        allocation: What is kept of their candidates.
        positions: How many the model has, if that is known.
    """
    try:
        return _program(model, allocation, positions)
    except NotExpressibleError as error:
        return Reason(str(error))


def _program(model: ir.Model, allocation: Allocation, positions: int | None) -> StepProgram:
    if any(node.op_type == "Attention" for node in model.graph):
        raise NotExpressibleError("its attention stays the standard operator")
    outputs = {value.name: value for value in model.graph.outputs}
    if LOGITS not in outputs:
        raise NotExpressibleError("it has no logits")
    walk = walk_graph(model, allocation)
    logits = walk.whole(outputs[LOGITS])
    dtype = _DTYPES.get(_activations(model) or ir.DataType.UNDEFINED)
    if dtype is None:
        raise NotExpressibleError("it computes in an unknown type")
    ops = [_renamed(op, logits.buffer) for op in walk.ops]
    fused = share_keys(fuse(ops), functools.partial(_values, model))
    _check(fused, model)
    embed = next(op for op in fused if isinstance(op, Embed))
    return StepProgram(
        dtype,
        embed.n,
        logits.width,
        positions,
        tuple(walk.cache),
        tuple(fused),
    )


def _values(model: ir.Model, name: str) -> NDArray[np.generic]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _renamed(op: Op, logits: str) -> Op:
    return dataclasses.replace(op, out=LOGITS) if op.out == logits else op


def _check(ops: list[Op], model: ir.Model) -> None:
    """Raise if the program is none that a runtime could run."""
    last = ops[-1] if ops else None
    if not isinstance(last, Linear) or last.out != LOGITS:
        raise NotExpressibleError("its logits are no product")
    if any(isinstance(op, AddBias) for op in ops):
        raise NotExpressibleError("it adds a bias to something else than a product")
    slots = sum((value.name or "").startswith("past_key_values.") for value in model.graph.inputs)
    layers = sum(isinstance(op, Attention) for op in ops)
    if 2 * layers != slots:
        raise NotExpressibleError("not every layer with a cache attends to it")


def _activations(model: ir.Model) -> ir.DataType | None:
    node = next(iter(routed_experts(model)))
    return None if node.inputs[0] is None else node.inputs[0].dtype
