"""GroupQueryAttention: one step of it, and its cache."""

from __future__ import annotations

import math
import re

import onnx_ir as ir

from alloc_moe.passes.step.matching import (
    NotExpressibleError,
    argument,
    integer,
    real,
    sizes,
    weight_name,
)
from alloc_moe.passes.step.parts import Rotary, Slice
from alloc_moe.passes.step.records import Attention, CacheLayer
from alloc_moe.passes.step.state import Results, Row, Walk

_SLOT = re.compile(r"past_key_values\.(\d+)\.key")
_COS, _SIN = 7, 8
_OTHERS = {
    10: "adds a bias to its scores",
    11: "has a sink in each head",
    12: "keeps its cache in 8 bits",
    13: "keeps its cache in 8 bits",
}
"""What an input says that a step program has no words for."""


def visit(walk: Walk, node: ir.Node) -> Results:
    """Write attention down."""
    for index, does in _OTHERS.items():
        if argument(node, index) is not None:
            raise NotExpressibleError(f"its attention {does}")
    if integer(node, "local_window_size", -1) != -1:
        raise NotExpressibleError("its attention has a window")
    heads, kv_heads = integer(node, "num_heads", 0), integer(node, "kv_num_heads", 0)
    query, key, value = _projections(walk, node, heads, kv_heads)
    size = query.width // heads
    if key.width != kv_heads * size or value.width != kv_heads * size:
        raise NotExpressibleError("its keys and values are of two sizes")
    layer = _layer(node)
    made = walk.buffer(query.width)
    scale = real(node, "scale", 0.0)
    softcap = real(node, "softcap", 0.0)
    walk.add(
        Attention(
            layer,
            Slice(query.buffer, query.offset),
            Slice(key.buffer, key.offset),
            Slice(value.buffer, value.offset),
            made.buffer,
            heads,
            kv_heads,
            size,
            scale or 1 / math.sqrt(size),
            rotary=_rotary(node),
            softcap=softcap or None,
        )
    )
    walk.cache.append(CacheLayer(layer, kv_heads, size, size))
    return {node.outputs[0]: made}


def _projections(walk: Walk, node: ir.Node, heads: int, kv_heads: int) -> tuple[Row, Row, Row]:
    """Return queries, keys and values, which may come as one."""
    given = node.inputs[:3]
    if given[1] is not None and given[2] is not None:
        query, key, value = (walk.row(put) for put in given)
        return query, key, value
    packed = walk.row(given[0])
    size, rest = divmod(packed.width, heads + 2 * kv_heads)
    if rest:
        raise NotExpressibleError("its packed projections are of no whole heads")
    rows, offset = [], packed.offset
    for count in (heads, kv_heads, kv_heads):
        rows.append(Row(packed.buffer, offset, count * size, packed.whole))
        offset += count * size
    return rows[0], rows[1], rows[2]


def _layer(node: ir.Node) -> int:
    past = argument(node, 3)
    match = _SLOT.fullmatch(past.name or "") if past is not None else None
    if match is None:
        raise NotExpressibleError("its attention has no cache")
    return int(match[1])


def _rotary(node: ir.Node) -> Rotary | None:
    if not integer(node, "do_rotary", 0):
        return None
    cos, sin = weight_name(argument(node, _COS)), weight_name(argument(node, _SIN))
    shape = sizes(argument(node, _COS))
    if cos is None or sin is None or len(shape) != 2 or shape[1] is None:
        raise NotExpressibleError("its rotary embedding has no tables")
    if argument(node, 9) is not None:
        raise NotExpressibleError("its rotary embedding takes positions")
    return Rotary(cos, sin, 2 * shape[1], bool(integer(node, "rotary_interleaved", 0)))
