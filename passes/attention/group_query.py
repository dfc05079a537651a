"""Attend with onnxruntime's GroupQueryAttention, which appends to a preallocated cache in place."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.attention.layers import (
    ROWS_TO_HEADS,
    AttentionLayer,
    free_past_lengths,
    heads_of,
    insert,
    is_batch,
    is_transposed,
    match_layers,
    merging,
    producer,
    rank,
    take_over,
)
from alloc_moe.passes.base import DOMAIN, MICROSOFT, OPSET, add_function, add_initializer

GROUP_QUERY_ATTENTION = "GroupQueryAttention"


@script(OPSET, default_opset=op)
def attended_columns(
    attention_mask: INT64[...], input_ids: INT64[...]
) -> tuple[FLOAT[...], INT32[...], INT32[...]]:
    """Say which columns of the cache each token may attend to, but for causality.

    Returns:
        What is added to the attention scores [batch, 1, sequence, total]: nothing, or -1e9 for
        padding. Then the index of each row's last column [batch], and the number of columns: rows
        start at column 0, padding included, so all of them end at the same one.
    """
    columns = op.Where(
        op.Cast(attention_mask, to=9),
        op.Constant(value_float=0.0),
        # Finite, so that a padding token, which sees nothing but padding, gets numbers.
        op.Constant(value_float=-1e9),
    )
    rows = op.Unsqueeze(columns, op.Constant(value_ints=[1, 2]))
    one = op.Constant(value_ints=[1])
    sequence = op.Shape(input_ids, start=1, end=2)
    bias = op.Expand(rows, op.Concat(one, one, sequence, one, axis=0))
    total = op.Cast(op.Shape(attention_mask, start=1, end=2), to=6)
    last = op.Sub(total, op.Cast(one, to=6))
    return bias, op.Expand(last, op.Shape(attention_mask, start=0, end=1)), op.Squeeze(total)


class GroupAttentionPass(ir.passes.InPlacePass):
    """Replace ``Concat`` of the cache, and the ``Attention`` to it, by ``GroupQueryAttention``.

    All layers or none: it takes float32, keys and values of one shape, and masks that hide nothing
    but later tokens, padding and what lies before a window. What the graph computes for real tokens
    stays the same; for padding tokens it is some finite number instead of zero.

    Bound to one buffer, a cache input and its output may have any capacity; the past is as long as
    the attention mask leaves it, whatever the size of the buffer. The operator continues a batch of
    several sequences by one token at a time only.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = match_layers(model, (ir.DataType.FLOAT,))
        if not found:
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        columns = _Columns(model)
        for layer in found:
            _replace(model, layer, columns)
        free_past_lengths(model)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        check_pasts(model)


def group_attention(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the GroupQueryAttention nodes in graph order."""
    for node in model.graph:
        if node.domain == MICROSOFT and node.op_type == GROUP_QUERY_ATTENTION:
            yield node


def check_pasts(model: ir.Model) -> None:
    """Raise PostconditionError if something else reads a cache, whose buffer may be longer."""
    for node in group_attention(model):
        for past in node.inputs[3:5]:
            assert past is not None
            others = [user for user in past.consumers() if user is not node]
            if not all(is_batch(user) for user in others):
                raise ir.passes.PostconditionError(
                    f"{past.name} is read by {[user.name for user in others]} too, which don't "
                    "know that its buffer may be longer than the past."
                )


class _Columns:
    """What all layers share: lengths and padding, computed before the graph's first node."""

    def __init__(self, model: ir.Model) -> None:
        inputs = {value.name: value for value in model.graph.inputs}
        self.mask, self.ids = inputs["attention_mask"], inputs["input_ids"]
        add_function(model, attended_columns)
        node = ir.node(
            attended_columns.name,
            [self.mask, self.ids],
            domain=DOMAIN,
            num_outputs=3,
            name="attended_columns",
        )
        for value, name in zip(node.outputs, ("padding", "last_column", "columns"), strict=True):
            value.name = f"{DOMAIN}.{name}"
        self.padding, self.last, self.total = node.outputs
        self.merge_shape = add_initializer(
            model, ir.tensor(np.array([0, 0, -1], np.int64), name=f"{DOMAIN}.merge_heads")
        )
        model.graph.insert_before(model.graph[0], node)


def _replace(model: ir.Model, layer: AttentionLayer, columns: _Columns) -> None:
    at = layer.node
    rows = [_merged(model, at, value, columns) for value in (at.inputs[0], layer.key, layer.value)]
    optional = [None] * 3  # cosine and sine, positions: RotaryEmbedding stays a node of its own
    inputs = [*rows, *layer.past, columns.last, columns.total, *optional, columns.padding]
    if layer.sinks is not None:
        numbers = layer.sinks.numpy().reshape(-1).astype(np.float32)
        sinks = ir.tensor(numbers, name=f"{DOMAIN}.sinks.{at.outputs[0].name}")
        inputs.append(add_initializer(model, sinks))
    attend(model, layer, inputs, {"local_window_size": layer.window} if layer.window else {})


def attend(
    model: ir.Model,
    layer: AttentionLayer,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int],
) -> ir.Node:
    """Put the operator in a layer's place, the layer's heads and scale among its attributes."""
    at = layer.node
    given: dict[str, int | float] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads}
    if (scale := at.attributes.get("scale")) is not None:
        given["scale"] = scale.as_float()
    given |= attributes
    node = insert(model, at, GROUP_QUERY_ATTENTION, inputs, given, MICROSOFT, outputs=3)
    for old, new in zip(layer.present, node.outputs[1:], strict=True):
        take_over(old, new)
    merged = merging(at.outputs[0])
    if merged is not None:
        take_over(merged, node.outputs[0])
        return node
    shape = ir.tensor(
        np.array([0, 0, layer.heads, layer.head_size], np.int64),
        name=f"{DOMAIN}.split_heads.{at.outputs[0].name}",
    )
    split = insert(model, at, "Reshape", [node.outputs[0], add_initializer(model, shape)])
    heads = insert(model, at, "Transpose", split.outputs, {"perm": ROWS_TO_HEADS})
    take_over(at.outputs[0], heads.outputs[0])
    return node


def _merged(model: ir.Model, at: ir.Node, value: ir.Value, columns: _Columns) -> ir.Value:
    """Return [batch, heads, sequence, size] as [batch, sequence, heads * size]."""
    node = value.producer()
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        assert node.inputs[0] is not None
        source = _merged(model, at, node.inputs[0], columns)
        attributes = {**node.attributes, "num_heads": heads_of(value)[0]}
        rotated = insert(model, at, "RotaryEmbedding", [source, *node.inputs[1:]], attributes)
        return rotated.outputs[0]
    if node is not None and is_transposed(node):
        rows = node.inputs[0]
        split = producer(rows)
        if split is not None and split.op_type == "Reshape" and rank(split.inputs[0]) == 3:
            return split.inputs[0]
    else:
        rows = insert(model, at, "Transpose", [value], {"perm": ROWS_TO_HEADS}).outputs[0]
    return insert(model, at, "Reshape", [rows, columns.merge_shape]).outputs[0]
