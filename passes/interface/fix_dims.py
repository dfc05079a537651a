"""Name the symbolic dimensions of inputs and outputs, and make fixed ones integers."""

from __future__ import annotations

import onnx_ir as ir

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"


class FixDimsPass(ir.passes.InPlacePass):
    """Give every input and output dimension its role's name instead of the exporter's ``s44``.

    ``input_ids`` is [batch_size, sequence_length], a cache input has past_sequence_length where the
    exporter left another symbol, a cache output has total_sequence_length there. Dimensions that
    the exporter wrote as the string of a number become that number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for values, growing in ((model.graph.inputs, PAST), (model.graph.outputs, TOTAL)):
            for value in values:
                if value.shape is None:
                    continue
                shape = ir.Shape(_roles(value, growing))
                if shape != value.shape:
                    value.shape = shape
                    modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        roles = {BATCH, SEQUENCE, PAST, TOTAL}
        for value in (*model.graph.inputs, *model.graph.outputs):
            for dim in value.shape or ():
                if not isinstance(dim, int) and str(dim.value) not in roles:
                    raise ir.passes.PostconditionError(
                        f"{value.name} has the dimension {dim.value!r}, "
                        f"which is none of {sorted(roles)}."
                    )


def _roles(value: ir.Value, growing: str) -> list[int | str]:
    assert value.shape is not None
    if value.name in ("input_ids", "position_ids"):
        return [BATCH, SEQUENCE]
    if value.name == "attention_mask":
        return [BATCH, TOTAL]
    if value.name == "logits":
        vocabulary = _fixed(value.shape[-1])
        return [BATCH, SEQUENCE, vocabulary if isinstance(vocabulary, int) else str(vocabulary)]
    dims = [_fixed(dim) for dim in value.shape]
    return [BATCH, *(dim if isinstance(dim, int) else growing for dim in dims[1:])]


def _fixed(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(dim, int):
        return dim
    text = str(dim.value)
    return int(text) if text.isdigit() else dim
