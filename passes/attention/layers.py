"""What exported attention looks like: a cache that is concatenated to, heads, masks, lengths."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from alloc_moe.passes.attention.masks import split_sinks, window_of
from alloc_moe.passes.base import DOMAIN

PAST = "past_key_values."

_KEYS_OR_VALUES = re.compile(re.escape(PAST) + r"\d+\.(?:key|value)")
_HEAD_SIZE_MULTIPLE = 8  # GroupQueryAttention takes no other sizes
ROWS_TO_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True)
class AttentionLayer:
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


def match_layers(
    model: ir.Model, dtypes: Collection[ir.DataType | None]
) -> Sequence[AttentionLayer]:
    """Return all attention layers if GroupQueryAttention can compute them all, else none.

    It takes keys and values of one shape, and masks that hide nothing but later tokens, padding and
    what lies before a window.

    Args:
        model: Its Attention nodes are looked at.
        dtypes: The types of cache that will do.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    layers = [_match(node, dtypes) for node in nodes]
    found = [layer for layer in layers if layer is not None]
    complete = len(found) == len(nodes) and len(found) >= _cache_inputs(model) / 2
    return found if complete else ()


def _match(node: ir.Node, dtypes: Collection[ir.DataType | None]) -> AttentionLayer | None:
    query, keys, values, mask = (*node.inputs, *[None] * 4)[:4]
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = not (settings.get("softcap") or settings.get("is_causal")) and len(node.inputs) == 4
    heads, size = heads_of(query)
    mask, sinks = split_sinks(mask, heads)
    key, value = (_cached(states, padded=sinks is not None) for states in (keys, values))
    window = window_of(mask)
    if not plain or key is None or value is None or window is None:
        return None
    past_key, new_key, past_value, new_value = (
        given for given in (*key.inputs, *value.inputs) if given is not None
    )
    kv_heads, kv_size = heads_of(new_key)
    if (
        past_key.dtype not in dtypes
        or heads_of(new_value) != (kv_heads, size)
        or kv_size != size
        or size % _HEAD_SIZE_MULTIPLE
        or heads % max(kv_heads, 1)
    ):
        return None
    present = (key.outputs[0], value.outputs[0])
    if not all(output.is_graph_output() for output in present):
        return None
    past, shape = (past_key, past_value), (heads, kv_heads, size)
    return AttentionLayer(node, new_key, new_value, past, present, *shape, window, sinks)


def _cached(value: ir.Value | None, *, padded: bool) -> ir.Node | None:
    """Return the Concat of past and new, looking through the repetition of key/value heads.

    With `padded` it is followed by the column of the sinks.
    """
    node = producer(value)
    if node is not None and node.op_type == "Reshape":
        expand = producer(node.inputs[0])
        repeat = None if expand is None else producer(expand.inputs[0])
        if expand is None or expand.op_type != "Expand" or repeat is None:
            return None
        if repeat.op_type != "Unsqueeze" or constant(repeat.inputs[1]) != [2]:
            return None
        node = producer(repeat.inputs[0])
    if padded:
        if node is None or node.op_type != "Pad":
            return None
        node = producer(node.inputs[0])
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past = node.inputs[0]
    grows = node.attributes["axis"].as_int() in (-2, 2)
    named = past is not None and past.is_graph_input() and (past.name or "").startswith(PAST)
    return node if grows and named else None


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give a value another one's place, name and type; it may be an output of the graph."""
    new.name, old.name = old.name, f"{old.name}.{DOMAIN}.replaced"
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def merging(value: ir.Value) -> ir.Value | None:
    """Return what merges the heads again, past the zeros for tokens that see nothing."""
    for op_type in ("Where", "Transpose", "Reshape"):
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type != op_type or value.is_graph_output():
            return None
        if op_type == "Transpose" and not is_transposed(users[0]):
            return None
        value = users[0].outputs[0]
    return value if rank(value) == 3 else None


def free_past_lengths(model: ir.Model) -> None:
    """Let the length of the past come from the attention mask, not from the cache's buffer."""
    inputs = {value.name: value for value in model.graph.inputs}
    shapes = [
        user
        for value in model.graph.inputs
        if (value.name or "").startswith(PAST)
        for user in value.consumers()
        if user.op_type == "Shape" and _span(user) == (2, 3)
    ]
    if not shapes:
        return
    at = model.graph[0]
    total = insert(model, at, "Shape", [inputs["attention_mask"]], {"start": 1, "end": 2})
    new = insert(model, at, "Shape", [inputs["input_ids"]], {"start": 1, "end": 2})
    past = insert(model, at, "Sub", [total.outputs[0], new.outputs[0]])
    for node in shapes:
        ir.convenience.replace_all_uses_with(node.outputs[0], past.outputs[0])


def measure_tokens(model: ir.Model) -> None:
    """Let the sizes of batch and sequence come from ``input_ids``, not from any other input."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    for value in model.graph.inputs:
        spans = {(0, 1), (1, 2)} if value.name == "position_ids" else {(0, 1)}
        for user in list(value.consumers()):
            if user.op_type == "Shape" and _span(user) in spans:
                user.replace_input_with(0, ids)


def insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
    *,
    outputs: int = 1,
) -> ir.Node:
    """Return a new node before another one."""
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
    """Return how many inputs are keys or values of the past; states of other layers are none."""
    return sum(bool(_KEYS_OR_VALUES.fullmatch(value.name or "")) for value in model.graph.inputs)


def heads_of(value: ir.Value | None) -> tuple[int, int]:
    """Return heads and head size of [batch, heads, sequence, size]; zeros if they aren't fixed."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 4:
        return 0, 0
    heads, size = shape[1], shape[3]
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else (0, 0)


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a value."""
    return None if value is None else value.producer()


def rank(value: ir.Value | None) -> int | None:
    """Return the number of dimensions, if it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def is_transposed(node: ir.Node) -> bool:
    """Whether a node swaps heads and sequence."""
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == ROWS_TO_HEADS


def is_batch(node: ir.Node) -> bool:
    """Whether a node returns the first dimension."""
    return node.op_type == "Shape" and _span(node) == (0, 1)


def _span(node: ir.Node) -> tuple[int, int | None]:
    """Return which axes a Shape node returns."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return 0 if start is None else start.as_int(), None if end is None else end.as_int()


def constant(value: ir.Value | None) -> list[int] | None:
    """Return the integers of a constant, None of what is no constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
