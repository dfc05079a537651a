"""Attend with onnxruntime's GroupQueryAttention, which appends to a preallocated cache in place."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.attention.masks import split_sinks, window_of
from alloc_moe.passes.base import DOMAIN, OPSET, add_function, add_initializer

MICROSOFT = "com.microsoft"
GROUP_QUERY_ATTENTION = "GroupQueryAttention"

_PAST = "past_key_values."
_HEAD_SIZE_MULTIPLE = 8  # the kernel takes no other sizes
_ROWS_TO_HEADS = (0, 2, 1, 3)


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
        nodes = [node for node in model.graph if node.op_type == "Attention"]
        layers = [_match(node) for node in nodes]
        found = [layer for layer in layers if layer is not None]
        if not found or len(found) < len(nodes) or len(found) < _cache_inputs(model) / 2:
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        columns = _Columns(model)
        for layer in found:
            _replace(model, layer, columns)
        _free_past_lengths(model, columns)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in group_attention(model):
            for past in node.inputs[3:5]:
                assert past is not None
                others = [user for user in past.consumers() if user is not node]
                if not all(_is_batch(user) for user in others):
                    raise ir.passes.PostconditionError(
                        f"{past.name} is read by {[user.name for user in others]} too, which don't "
                        "know that its buffer may be longer than the past."
                    )


def group_attention(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the GroupQueryAttention nodes in graph order."""
    for node in model.graph:
        if node.domain == MICROSOFT and node.op_type == GROUP_QUERY_ATTENTION:
            yield node


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: new keys and values [batch, heads, sequence, size] and their cache.

    ``window`` is how many tokens each attends to, 0 for all; ``sinks`` are scores of no column, one
    per head.
    """

    node: ir.Node
    key: ir.Value
    value: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    heads: int
    kv_heads: int
    head_size: int
    window: int
    sinks: ir.TensorProtocol | None


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


def _match(node: ir.Node) -> _Layer | None:
    """Return what the operator needs of a layer, None if it can't compute that layer."""
    query, keys, values, mask = (*node.inputs, *[None] * 4)[:4]
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = not (settings.get("softcap") or settings.get("is_causal")) and len(node.inputs) == 4
    heads, size = _heads(query)
    mask, sinks = split_sinks(mask, heads)
    key, value = (_cached(states, padded=sinks is not None) for states in (keys, values))
    window = window_of(mask)
    if not plain or key is None or value is None or window is None:
        return None
    past_key, new_key, past_value, new_value = (
        given for given in (*key.inputs, *value.inputs) if given is not None
    )
    kv_heads, kv_size = _heads(new_key)
    if (
        past_key.dtype != ir.DataType.FLOAT
        or _heads(new_value) != (kv_heads, size)
        or kv_size != size
        or size % _HEAD_SIZE_MULTIPLE
        or heads % max(kv_heads, 1)
    ):
        return None
    present = (key.outputs[0], value.outputs[0])
    if not all(output.is_graph_output() for output in present):
        return None
    past, shape = (past_key, past_value), (heads, kv_heads, size)
    return _Layer(node, new_key, new_value, past, present, *shape, window, sinks)


def _cached(value: ir.Value | None, *, padded: bool) -> ir.Node | None:
    """Return the Concat of past and new, looking through the repetition of key/value heads.

    With `padded` it is followed by the column of the sinks.
    """
    node = _producer(value)
    if node is not None and node.op_type == "Reshape":
        expand = _producer(node.inputs[0])
        repeat = None if expand is None else _producer(expand.inputs[0])
        if expand is None or expand.op_type != "Expand" or repeat is None:
            return None
        if repeat.op_type != "Unsqueeze" or _constant(repeat.inputs[1]) != [2]:
            return None
        node = _producer(repeat.inputs[0])
    if padded:
        if node is None or node.op_type != "Pad":
            return None
        node = _producer(node.inputs[0])
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past = node.inputs[0]
    grows = node.attributes["axis"].as_int() in (-2, 2)
    named = past is not None and past.is_graph_input() and (past.name or "").startswith(_PAST)
    return node if grows and named else None


def _replace(model: ir.Model, layer: _Layer, columns: _Columns) -> None:
    at = layer.node
    rows = [_merged(model, at, value, columns) for value in (at.inputs[0], layer.key, layer.value)]
    attributes: dict[str, int | float] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads}
    if (scale := at.attributes.get("scale")) is not None:
        attributes["scale"] = scale.as_float()
    if layer.window:
        attributes["local_window_size"] = layer.window
    optional = [None] * 3  # cosine and sine, positions: RotaryEmbedding stays a node of its own
    inputs = [*rows, *layer.past, columns.last, columns.total, *optional, columns.padding]
    if layer.sinks is not None:
        numbers = layer.sinks.numpy().reshape(-1).astype(np.float32)
        sinks = ir.tensor(numbers, name=f"{DOMAIN}.sinks.{at.outputs[0].name}")
        inputs.append(add_initializer(model, sinks))
    node = _insert(model, at, GROUP_QUERY_ATTENTION, inputs, attributes, MICROSOFT, outputs=3)
    for old, new in zip(layer.present, node.outputs[1:], strict=True):
        _take_over(old, new)
    merged = _merging(at.outputs[0])
    if merged is not None:
        _take_over(merged, node.outputs[0])
        return
    shape = add_initializer(
        model,
        ir.tensor(
            np.array([0, 0, layer.heads, layer.head_size], np.int64),
            name=f"{DOMAIN}.split_heads.{at.outputs[0].name}",
        ),
    )
    split = _insert(model, at, "Reshape", [node.outputs[0], shape])
    heads = _insert(model, at, "Transpose", split.outputs, {"perm": _ROWS_TO_HEADS})
    _take_over(at.outputs[0], heads.outputs[0])


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Give a value another one's place, name and type; it may be an output of the graph."""
    new.name, old.name = old.name, f"{old.name}.{DOMAIN}.replaced"
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _merged(model: ir.Model, at: ir.Node, value: ir.Value, columns: _Columns) -> ir.Value:
    """Return [batch, heads, sequence, size] as [batch, sequence, heads * size]."""
    node = value.producer()
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        assert node.inputs[0] is not None
        source = _merged(model, at, node.inputs[0], columns)
        attributes = {**node.attributes, "num_heads": _heads(value)[0]}
        rotated = _insert(model, at, "RotaryEmbedding", [source, *node.inputs[1:]], attributes)
        return rotated.outputs[0]
    if node is not None and _is_transposed(node):
        rows = node.inputs[0]
        split = _producer(rows)
        if split is not None and split.op_type == "Reshape" and _rank(split.inputs[0]) == 3:
            return split.inputs[0]
    else:
        rows = _insert(model, at, "Transpose", [value], {"perm": _ROWS_TO_HEADS}).outputs[0]
    return _insert(model, at, "Reshape", [rows, columns.merge_shape]).outputs[0]


def _merging(value: ir.Value) -> ir.Value | None:
    """Return what merges the heads again, past the zeros for tokens that see nothing."""
    for op_type in ("Where", "Transpose", "Reshape"):
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type != op_type or value.is_graph_output():
            return None
        if op_type == "Transpose" and not _is_transposed(users[0]):
            return None
        value = users[0].outputs[0]
    return value if _rank(value) == 3 else None


def _free_past_lengths(model: ir.Model, columns: _Columns) -> None:
    """Let the length of the past come from the attention mask, not from the cache's buffer."""
    shapes = [
        user
        for value in model.graph.inputs
        if (value.name or "").startswith(_PAST)
        for user in value.consumers()
        if user.op_type == "Shape" and _span(user) == (2, 3)
    ]
    if not shapes:
        return
    at = model.graph[0]
    total = _insert(model, at, "Shape", [columns.mask], {"start": 1, "end": 2})
    new = _insert(model, at, "Shape", [columns.ids], {"start": 1, "end": 2})
    past = _insert(model, at, "Sub", [total.outputs[0], new.outputs[0]])
    for node in shapes:
        ir.convenience.replace_all_uses_with(node.outputs[0], past.outputs[0])


def _insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, object] | None = None,
    domain: str = "",
    *,
    outputs: int = 1,
) -> ir.Node:
    node = ir.node(
        op_type,
        inputs,
        attributes=attributes,
        domain=domain,
        num_outputs=outputs,
    )
    model.graph.insert_before(before, node)
    return node


def _cache_inputs(model: ir.Model) -> int:
    return sum((value.name or "").startswith(_PAST) for value in model.graph.inputs)


def _heads(value: ir.Value | None) -> tuple[int, int]:
    """Return heads and head size of [batch, heads, sequence, size]; zeros if they aren't fixed."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 4:
        return 0, 0
    heads, size = shape[1], shape[3]
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else (0, 0)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_transposed(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _ROWS_TO_HEADS
    )


def _is_batch(node: ir.Node) -> bool:
    return node.op_type == "Shape" and _span(node) == (0, 1)


def _span(node: ir.Node) -> tuple[int, int | None]:
    """Return which axes a Shape node returns."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return 0 if start is None else start.as_int(), None if end is None else end.as_int()


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
