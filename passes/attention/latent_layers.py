"""What exported latent attention looks like: keys and values that are products of a cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from alloc_moe.passes.attention.layers import PAST, constant, heads_of, insert, producer, rank
from alloc_moe.passes.attention.masks import window_of
from alloc_moe.passes.attention.projections import Projection, match_projection
from alloc_moe.passes.base import shared_integers

_LAST_AXIS = (-1, 3)


@dataclass(frozen=True)
class PairRotation:
    """A rotation by position of elements 2i and 2i + 1 of each head together.

    ``source`` [batch, heads, sequence, size] is what is rotated; ``cosine`` and ``sine``
    [batch, sequence, size / 2] are by what. What comes out has the first of all pairs, then the
    second.
    """

    source: ir.Value
    cosine: ir.Value
    sine: ir.Value


@dataclass(frozen=True)
class LatentLayer:
    """One layer's latent attention.

    Of each head's query ``own`` [batch, heads, sequence, own size] meets what ``expansion``
    [heads * (own size + value size), rank] makes of the latents, and ``turned``
    [batch, heads, sequence, turned size] what all heads share of the keys. ``latent``
    [batch, 1, sequence, rank] and ``shared`` [batch, 1, sequence, turned size] are the new tokens';
    ``past`` and ``present`` are the caches of both. ``attended`` [batch, sequence, heads * value
    size] is the result. Queries are multiplied by ``factor`` [batch, 1, sequence, 1], if there is
    one.
    """

    node: ir.Node
    own: ir.Value
    turned: ir.Value
    latent: ir.Value
    shared: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    expansion: Projection
    attended: ir.Value
    heads: int
    value_size: int
    scale: float
    factor: ir.Value | None = None


def match_latent_layers(
    model: ir.Model, dtypes: Collection[ir.DataType | None]
) -> Sequence[LatentLayer]:
    """Return all attention layers if all are latent and without windows, else none.

    All have as many heads, and caches of one size.

    Args:
        model: Its Attention nodes are looked at.
        dtypes: The types of cache that will do.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    layers = [_match(node, dtypes) for node in nodes]
    found = [layer for layer in layers if layer is not None]
    sizes = {(layer.heads, heads_of(layer.latent), heads_of(layer.shared)) for layer in found}
    return found if len(sizes) == 1 and len(found) == len(nodes) else ()


def _match(node: ir.Node, dtypes: Collection[ir.DataType | None]) -> LatentLayer | None:
    if len(node.inputs) != 4 or any(
        name in node.attributes and node.attributes[name].value for name in ("softcap", "is_causal")
    ):
        return None
    query, keys, values, mask = node.inputs
    query, factor = _scaled(query)
    asked, known = _parts(query), _parts(keys)
    attended, scale = _merged(node.outputs[0]), node.attributes.get("scale")
    if asked is None or known is None or attended is None or scale is None or window_of(mask) != 0:
        return None
    split, expand = producer(known[0]), producer(known[1])
    if split is None or split.op_type != "Split" or list(split.outputs) != [known[0], values]:
        return None
    if expand is None or expand.op_type != "Expand":
        return None
    reshape = _before(split, "Transpose", "Reshape")
    expansion = None if reshape is None else match_projection(reshape.inputs[0])
    if expansion is None or not expansion.is_whole or len(list(expansion.value.consumers())) != 1:
        return None
    latents, shared = _cached(expansion.source), _cached(expand)
    if latents is None or shared is None:
        return None
    (past, latent), (past_shared, new_shared) = (cache.inputs for cache in (latents, shared))
    heads, value_size = heads_of(values)
    if past is None or past_shared is None or latent is None or new_shared is None:
        return None
    sizes = [heads_of(value)[1] for value in (*asked, latent, new_shared)]
    if not heads or 0 in sizes or past.dtype not in dtypes:
        return None
    return LatentLayer(
        node,
        *asked,
        latent,
        new_shared,
        past=(past, past_shared),
        present=(latents.outputs[0], shared.outputs[0]),
        expansion=expansion,
        attended=attended,
        heads=heads,
        value_size=value_size,
        scale=scale.as_float(),
        factor=factor,
    )


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Return a value and what multiplies each of its tokens, the same in all heads, if anything."""
    factors = _factors(value)
    if factors is None or factors[1].shape is None:
        return value, None
    sizes = factors[1].shape
    by_token = len(sizes) == 4 and (sizes[1], sizes[3]) == (1, 1)
    return factors if by_token else (value, None)


def _parts(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return the two that are joined along the last of four axes."""
    node = producer(value)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    last = node.attributes["axis"].as_int() in _LAST_AXIS
    return (first, second) if last and first is not None and second is not None else None


def _before(node: ir.Node | None, *op_types: str) -> ir.Node | None:
    """Return what comes before a node, if these do, the nearest first."""
    for op_type in op_types:
        node = None if node is None else producer(node.inputs[0])
        if node is None or node.op_type != op_type or len(list(node.outputs[0].consumers())) != 1:
            return None
    return node


def _cached(given: ir.Value | ir.Node | None) -> ir.Node | None:
    """Return the Concat of past and new columns that a value, or what a node reads, is."""
    node = producer(given.inputs[0] if isinstance(given, ir.Node) else given)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, present = node.inputs[0], node.outputs[0]
    named = past is not None and past.is_graph_input() and (past.name or "").startswith(PAST)
    grows = node.attributes["axis"].as_int() in (-2, 2)
    read = len(list(present.consumers()))
    return node if named and grows and read == 1 and present.is_graph_output() else None


def _merged(value: ir.Value) -> ir.Value | None:
    """Return what merges the heads again, past the zeros for tokens that see nothing."""
    while rank(value) != 3:
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type not in ("Where", "Reshape", "Transpose"):
            return None
        value = users[0].outputs[0]
    return value


def match_pairs(value: ir.Value) -> PairRotation | None:
    """Return the rotation of pairs that makes a value [batch, heads, sequence, size], if one does.

    It is concat(a cos - b sin, b cos + a sin) with a = x[..., 0::2] and b = x[..., 1::2], which may
    be computed in float32.
    """
    parts = _parts(_past_cast(value))
    if parts is None:
        return None
    first, second = producer(parts[0]), producer(parts[1])
    if first is None or second is None or (first.op_type, second.op_type) != ("Sub", "Add"):
        return None
    factors = [_factors(given) for given in (*first.inputs, *second.inputs)]
    found = [pair for pair in factors if pair is not None]
    if len(found) != 4:
        return None
    (even, cosine), (odd, sine) = found[:2]
    source = _every_second(even, 0)
    alike = found[2:] == [(odd, cosine), (even, sine)]
    if source is None or not alike or _every_second(odd, 1) is not source:
        return None
    angles = [_per_head(angle) for angle in (cosine, sine)]
    if angles[0] is None or angles[1] is None:
        return None
    return PairRotation(source, angles[0], angles[1])


def _factors(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = producer(value)
    if node is None or node.op_type != "Mul":
        return None
    first, second = node.inputs
    return None if first is None or second is None else (first, second)


def _every_second(value: ir.Value, offset: int) -> ir.Value | None:
    """Return what a Slice takes every second element of, from `offset` on."""
    node = producer(_past_cast(value))
    if node is None or node.op_type != "Slice" or len(node.inputs) != 5:
        return None
    start, end, axes, steps = (constant(given) for given in node.inputs[1:])
    size = heads_of(node.inputs[0])[1]
    whole = start == [offset] and end is not None and end[0] >= size > 0
    return node.inputs[0] if whole and axes in ([3], [-1]) and steps == [2] else None


def _past_cast(value: ir.Value) -> ir.Value:
    node = producer(value)
    given = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return value if given is None else given


def _per_head(value: ir.Value) -> ir.Value | None:
    """Return [batch, sequence, size] of what is the same for every head."""
    node = producer(value)
    if node is None or node.op_type != "Unsqueeze" or constant(node.inputs[1]) != [1]:
        return None
    return node.inputs[0]


def latent_rows(model: ir.Model, at: ir.Node, value: ir.Value) -> ir.Value:
    """Return [batch, 1, sequence, size] as [batch, sequence, size], made before a node."""
    node = producer(value)
    if node is not None and node.op_type == "Reshape" and rank(node.inputs[0]) == 3:
        assert node.inputs[0] is not None
        return node.inputs[0]
    return insert(model, at, "Squeeze", [value, shared_integers(model, "one_head", 1)]).outputs[0]
