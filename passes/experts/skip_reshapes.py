"""Leave out reshapes that nothing needs, around experts above all."""

from __future__ import annotations

import onnx_ir as ir

from alloc_moe.passes.base import MICROSOFT


class SkipReshapesPass(ir.passes.InPlacePass):
    """Let a QMoE node take [batch, sequence, hidden] as it is, and a reshape what was reshaped.

    Routers and experts are exported with tokens in one axis, [tokens, hidden].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if _is_reshape(node):
                modified |= _skip_first(node)
            elif node.domain == MICROSOFT and node.op_type == "QMoE":
                modified |= _keep_sequences(model, node)
        return ir.passes.PassResult(model, modified=modified)


def _is_reshape(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Reshape" and node.domain in ("", "ai.onnx")


def _skip_first(node: ir.Node) -> bool:
    """Reshape what is reshaped already from its source, if the target doesn't copy sizes."""
    given = node.inputs[0]
    first = None if given is None else given.producer()
    target = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    if first is None or not _is_reshape(first) or target is None or 0 in target.numpy():
        return False
    node.replace_input_with(0, first.inputs[0])
    return True


def _keep_sequences(model: ir.Model, node: ir.Node) -> bool:
    """Leave out the reshapes before and after experts, if these undo those."""
    tokens, output = node.inputs[0], node.outputs[0]
    before = None if tokens is None else tokens.producer()
    users = list(output.consumers())
    if before is None or not _is_reshape(before) or len(users) != 1 or not _is_reshape(users[0]):
        return False
    source, result = before.inputs[0], users[0].outputs[0]
    if source is None or source.shape is None or len(source.shape) != 3:
        return False
    if source.shape != result.shape or users[0].inputs[0] is not output:
        return False
    node.replace_input_with(0, source)
    output.name, output.type, output.shape = result.name, result.type, result.shape
    result.name = None
    ir.convenience.replace_all_uses_with(result, output, replace_graph_outputs=True)
    model.graph.remove(users[0], safe=True)
    return True
