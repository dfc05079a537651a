"""Let a caller that needs the last logits only have just those computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.base import DOMAIN, add_initializer

LOGITS_TO_KEEP_INPUT = "alloc_moe.logits_to_keep"
KEPT = "kept_sequence_length"

_PROJECTIONS = {"MatMul", "Gemm", "MatMulNBits"}
_ELEMENTWISE = {"Cast", "Mul", "Div", "Tanh", "Add"}


class KeepLogitsPass(ir.passes.InPlacePass):
    """Slice the hidden states before the language model head.

    How many positions are kept at the end of the sequence, is an input that may be left out, as in
    transformers: ``alloc_moe.logits_to_keep``, int64 [1], 0 for all of them by default.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
        head = None if logits is None else _head(logits)
        if head is None or logits is None or LOGITS_TO_KEEP_INPUT in model.graph.initializers:
            return ir.passes.PassResult(model, modified=False)
        keep = _constant(model, LOGITS_TO_KEEP_INPUT, 0)
        model.graph.inputs.append(keep)  # an initializer that is an input too may be left out
        start = ir.node("Neg", [keep])
        end = _constant(model, f"{DOMAIN}.sequence_end", np.iinfo(np.int64).max)
        axis = _constant(model, f"{DOMAIN}.sequence_axis", 1)
        kept = ir.node("Slice", [head.inputs[0], start.outputs[0], end, axis])
        model.graph.insert_before(head, [start, kept])
        head.replace_input_with(0, kept.outputs[0])
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], KEPT, *logits.shape[2:]])
        return ir.passes.PassResult(model, modified=True)


def _head(logits: ir.Value) -> ir.Node | None:
    """Return the projection that makes the logits of [batch, sequence, hidden]."""
    node = logits.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is None or node.op_type not in _PROJECTIONS:
        return None
    hidden = node.inputs[0]
    ranked = hidden is not None and hidden.shape is not None and len(hidden.shape) == 3
    return node if ranked else None


def _constant(model: ir.Model, name: str, number: int) -> ir.Value:
    return add_initializer(model, ir.tensor(np.array([number], np.int64), name=name))
