"""Let a caller that needs the last logits only have just those computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from alloc_moe.passes.attention.group_query_rotary import right_padded_rows
from alloc_moe.passes.attention.right_padded import last_positions
from alloc_moe.passes.base import DOMAIN, add_function, add_initializer

LOGITS_TO_KEEP_INPUT = "alloc_moe.logits_to_keep"
KEPT = "kept_sequence_length"

_PROJECTIONS = {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul"}
_ELEMENTWISE = {"Cast", "Mul", "Div", "Tanh", "Add"}


class KeepLogitsPass(ir.passes.InPlacePass):
    """Slice the hidden states before the language model head.

    How many positions are kept at the end of the sequence, is an input that may be left out, as in
    transformers: ``alloc_moe.logits_to_keep``, int64 [1], 0 for all of them by default. Where rows
    are padded on the right, these are the last of each row that are no padding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
        head = None if logits is None else _head(logits)
        if head is None or logits is None or LOGITS_TO_KEEP_INPUT in model.graph.initializers:
            return ir.passes.PassResult(model, modified=False)
        keep = _constant(model, LOGITS_TO_KEEP_INPUT, 0)
        model.graph.inputs.append(keep)  # an initializer that is an input too may be left out
        rows = right_padded_rows(model)
        assert head.inputs[0] is not None
        if rows is None:
            nodes = _sliced(model, head.inputs[0], keep)
        else:
            nodes = [_last_of_rows(model, head.inputs[0], keep, rows)]
        model.graph.insert_before(head, nodes)
        head.replace_input_with(0, nodes[-1].outputs[0])
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], KEPT, *logits.shape[2:]])
        return ir.passes.PassResult(model, modified=True)


def _sliced(model: ir.Model, hidden: ir.Value, keep: ir.Value) -> list[ir.Node]:
    start = ir.node("Neg", [keep])
    end = _constant(model, f"{DOMAIN}.sequence_end", np.iinfo(np.int64).max)
    axis = _constant(model, f"{DOMAIN}.sequence_axis", 1)
    return [start, ir.node("Slice", [hidden, start.outputs[0], end, axis])]


def _last_of_rows(model: ir.Model, hidden: ir.Value, keep: ir.Value, rows: ir.Node) -> ir.Node:
    add_function(model, last_positions)
    *_, valid, lengths = rows.outputs
    node = ir.node(
        last_positions.name,
        [hidden, rows.inputs[0], lengths, valid, keep],
        domain=DOMAIN,
        name=last_positions.name,
    )
    kept = node.outputs[0]
    kept.name, kept.type = f"{DOMAIN}.last_positions", hidden.type
    if hidden.shape is not None:
        kept.shape = ir.Shape([hidden.shape[0], KEPT, *hidden.shape[2:]])
    return node


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
