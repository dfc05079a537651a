"""Compute routers' scores in float32, whatever the type of activations."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_SCORES = ("Softmax", "Sigmoid")


class FloatRouterPass(ir.passes.InPlacePass):
    """Cast to float32 before a ``Softmax`` or ``Sigmoid`` whose result is cast.

    PyTorch computes ``softmax(x, dtype=float32)`` so; the exporter casts what comes out.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = list(_cast_scores(model))
        for scores, cast in found:
            score = ir.node(
                scores.op_type,
                [_cast(model, scores)],
                attributes=dict(scores.attributes),
                name=scores.name,
            )
            old, new = cast.outputs[0], score.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            model.graph.insert_before(scores, score)
            ir.convenience.replace_all_uses_with(old, new)
            model.graph.remove(cast, safe=True)
            if not scores.outputs[0].uses():
                model.graph.remove(scores, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [scores.name for scores, _ in _cast_scores(model)]
        if left:
            raise ir.passes.PostconditionError(f"The scores {left} are computed in few bits.")


def _cast_scores(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    for cast in model.graph:
        value = cast.inputs[0] if cast.op_type == "Cast" else None
        scores = None if value is None else value.producer()
        if scores is None or scores.op_type not in _SCORES:
            continue
        to_float = cast.attributes["to"].as_int() == ir.DataType.FLOAT
        if to_float and value is not None and value.dtype != ir.DataType.FLOAT:
            yield scores, cast


def _cast(model: ir.Model, scores: ir.Node) -> ir.Value:
    """Return what the scores are of in float32."""
    source = scores.inputs[0]
    assert source is not None
    node = ir.node("Cast", [source], attributes={"to": int(ir.DataType.FLOAT)})
    value = node.outputs[0]
    value.name, value.shape = f"{source.name}.float", source.shape
    value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(scores, node)
    return value
