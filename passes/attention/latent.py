"""Attend to latents themselves, in a preallocated cache that is appended to in place."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.attention.latent_layers import (
    LatentLayer,
    latent_rows,
    match_latent_layers,
    match_pairs,
)
from alloc_moe.passes.attention.layers import (
    PAST,
    ROWS_TO_HEADS,
    free_past_lengths,
    heads_of,
    insert,
    is_batch,
    take_over,
)
from alloc_moe.passes.base import (
    DOMAIN,
    MICROSOFT,
    OPSET,
    add_function,
    add_initializer,
    lazy_tensor,
    shared_integers,
)

COLUMNS = "latent_columns"
_APPENDS = ("ScatterND", "ScatterElements")


@script(OPSET, default_opset=op)
def latent_columns(
    attention_mask: INT64[...], input_ids: INT64[...], past: FLOAT[...]
) -> tuple[FLOAT[...], INT64[...], INT64[...], INT64[...]]:
    """Say where new tokens go in the cache, and which columns each may attend to.

    Args:
        attention_mask: [batch, total].
        input_ids: [batch, sequence].
        past: A cache with room for the new tokens, [batch, 1, columns, size]; total <= columns.

    Returns:
        What is added to the attention scores [batch, 1, sequence, columns]: nothing, or -1e9 for
        padding, later tokens and columns that aren't written yet. Where in the cache each new token
        goes [batch, sequence, 3], and its column alone [batch, 1, 1, sequence]. The sizes batch,
        sequence and columns [3].
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    total = op.Shape(attention_mask, start=1, end=2)
    sequence = op.Shape(input_ids, start=1, end=2)
    batch = op.Shape(input_ids, start=0, end=1)
    columns = op.Shape(past, start=2, end=3)
    none = op.Constant(value_ints=[0])
    pads = op.Concat(none, none, none, op.Sub(columns, total), axis=0)
    real = op.Cast(op.Pad(attention_mask, pads), to=9)
    places = op.Range(op.Squeeze(op.Sub(total, sequence)), op.Squeeze(total), one)
    written = op.Range(zero, op.Squeeze(columns), one)
    earlier = op.LessOrEqual(written, op.Unsqueeze(places, op.Constant(value_ints=[1])))
    seen = op.And(op.Unsqueeze(real, op.Constant(value_ints=[1, 2])), earlier)
    # Finite, so that a padding token, which sees nothing but padding, gets numbers.
    bias = op.Where(seen, op.Constant(value_float=0.0), op.Constant(value_float=-1e9))
    shape = op.Concat(batch, sequence, op.Constant(value_ints=[1]), axis=0)
    rows = op.Range(zero, op.Squeeze(batch), one)
    row = op.Expand(op.Unsqueeze(rows, op.Constant(value_ints=[1, 2])), shape)
    place = op.Expand(op.Unsqueeze(places, op.Constant(value_ints=[1])), shape)
    indices = op.Concat(row, op.Sub(row, row), place, axis=-1)
    ones = op.Constant(value_ints=[1, 1])
    column = op.Expand(places, op.Concat(batch, ones, sequence, axis=0))
    return bias, indices, column, op.Concat(batch, sequence, columns, axis=0)


class LatentAttentionPass(ir.passes.InPlacePass):
    """Compute latent attention on what is cached, not on keys and values made of it at every step.

    A key is W_k latent, so its product with a query is that of the latent with W_k^T query; a value
    is W_v latent, so the sum of values is W_v times the sum of latents (DeepSeek-V2, section
    2.1.2). All layers or none, in float32 without windows. What the graph computes for real tokens
    stays the same up to rounding; for padding tokens it is some finite number instead of zero.

    A layer's cache is ``past_key_values.N.key`` [batch, 1, columns, rank + rotated size], and the
    latents once more, ``past_key_values.N.value`` [batch, 1, rank, columns]: each of the two
    products reads one in the order in which it lies. They must have room for the call's tokens: the
    graph writes these into them, and returns them. What they hold beyond must be finite.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = match_latent_layers(model, (ir.DataType.FLOAT,))
        if not layers or any(layer.expansion.block for layer in layers):
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        free_past_lengths(model)
        builder = _Builder(model, layers[0])
        for layer in layers:
            builder.replace(layer)
        common.CommonSubexpressionEliminationPass()(model)  # each layer asks for the same shape
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in latent_caches(model):
            past = node.inputs[0]
            assert past is not None
            others = [user for user in past.consumers() if user is not node]
            if not all(is_batch(user) or user.op_type == COLUMNS for user in others):
                raise ir.passes.PostconditionError(
                    f"{past.name} is read by {[user.name for user in others]} too, which don't "
                    "know that its buffer may be longer than the past."
                )


def latent_caches(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that append to caches of latents, in graph order."""
    for node in model.graph:
        past = node.inputs[0] if node.op_type in _APPENDS else None
        if past is not None and past.is_graph_input() and (past.name or "").startswith(PAST):
            yield node


class _Builder:
    """Replaces layers, which share what is known of columns."""

    def __init__(self, model: ir.Model, first: LatentLayer) -> None:
        self._model, self._integers = model, functools.partial(shared_integers, model)
        inputs = {value.name: value for value in model.graph.inputs}
        add_function(model, latent_columns)
        given = [inputs["attention_mask"], inputs["input_ids"], first.past[0]]
        node = ir.node(COLUMNS, given, domain=DOMAIN, num_outputs=4, name=COLUMNS)
        names = ("bias", "places", "column", "sizes")
        for value, name in zip(node.outputs, names, strict=True):
            value.name = f"{DOMAIN}.{name}"
        self._bias, self._places, column, measured = node.outputs
        model.graph.insert_before(model.graph[0], node)
        parts = ir.node("Split", [measured], {"axis": 0, "num_outputs": 3}, num_outputs=3)
        heads = self._integers("heads", first.heads)
        batch, sequence, columns = parts.outputs
        shape = ir.node("Concat", [batch, heads, sequence, columns], {"axis": 0})
        latents = self._integers("latents", 1, heads_of(first.latent)[1])
        sizes = ir.node("Concat", [batch, latents, sequence], {"axis": 0})
        expanded = ir.node("Expand", [column, sizes.outputs[0]])
        model.graph.insert_after(node, [parts, shape, sizes, expanded])
        self._scores, self._columns = shape.outputs[0], expanded.outputs[0]

    def replace(self, layer: LatentLayer) -> None:
        model, at, name = self._model, layer.node, layer.node.outputs[0].name
        width = heads_of(layer.latent)[1] + heads_of(layer.shared)[1]
        turned, new = self._rotated(layer)
        own = self._add(at, "MatMul", [layer.own, _keys(model, layer)])
        query = self._add(at, "Concat", [own, turned], {"axis": -1})
        if layer.factor is not None:
            query = self._add(at, "Mul", [query, layer.factor])
        as_rows = self._integers("as_rows", 0, 1, -1, width)
        rows = self._add(at, "Reshape", [query, as_rows])
        new = self._add(at, "Concat", [latent_rows(model, at, layer.latent), new], {"axis": -1})
        by_row = self._append(layer, 0, "ScatterND", [self._places, new])
        column = self._add(at, "Transpose", [layer.latent], {"perm": (0, 1, 3, 2)})
        by_column = self._append(layer, 1, "ScatterElements", [self._columns, column], axis=3)
        weights = self._scored(at, by_row, rows, layer.scale)
        latents = self._latents(at, by_column, weights, layer)
        values = self._add(at, "MatMul", [latents, _values(model, layer)])
        heads = self._add(at, "Transpose", [values], {"perm": ROWS_TO_HEADS})
        merged = self._add(at, "Reshape", [heads, self._integers("merge_heads", 0, 0, -1)])
        merged.name = f"{name}.merged"
        take_over(layer.attended, merged)

    def _rotated(self, layer: LatentLayer) -> tuple[ir.Value, ir.Value]:
        """Return what is rotated of queries, by head, and of keys [batch, sequence, size]."""
        at = layer.node
        query, key = match_pairs(layer.turned), match_pairs(layer.shared)
        if query is None or key is None:
            return layer.turned, latent_rows(self._model, at, layer.shared)
        # Both come out in another order than before.
        pairs = {"interleaved": 1}
        turned = [query.source, query.cosine, query.sine]
        new = [latent_rows(self._model, at, key.source), key.cosine, key.sine]
        return (
            self._add(at, "RotaryEmbedding", turned, pairs),
            self._add(at, "RotaryEmbedding", new, {**pairs, "num_heads": 1}),
        )

    def _append(
        self, layer: LatentLayer, index: int, op_type: str, new: list[ir.Value], **attributes: int
    ) -> ir.Value:
        """Return one of the two caches with the new tokens written into it."""
        past, present = layer.past[index], layer.present[index]
        latent = heads_of(layer.latent)[1]
        for value in (past, present):
            assert value.shape is not None
            batch, heads, columns, _ = value.shape
            width = latent + heads_of(layer.shared)[1]
            sizes = [latent, columns] if index else [columns, width]
            value.shape = ir.Shape([batch, heads, *sizes])
        cache = self._add(layer.node, op_type, [past, *new], attributes)
        take_over(present, cache)
        return cache

    def _scored(self, at: ir.Node, cache: ir.Value, rows: ir.Value, scale: float) -> ir.Value:
        """Return the weights of all columns [batch, 1, heads * sequence, columns]."""
        # The cache comes first: it is read row by row then, not packed for the product.
        by_column = {"transB": 1, "alpha": scale}
        columns = self._add(at, "FusedMatMul", [cache, rows], by_column, MICROSOFT)
        by_row = self._add(at, "Transpose", [columns], {"perm": (0, 1, 3, 2)})
        split = self._add(at, "Reshape", [by_row, self._scores])
        seen = self._add(at, "Add", [split, self._bias])
        weights = self._add(at, "Softmax", [seen], {"axis": -1})
        return self._add(at, "Reshape", [weights, self._integers("join_heads", 0, 1, -1, 0)])

    def _latents(
        self, at: ir.Node, cache: ir.Value, weights: ir.Value, layer: LatentLayer
    ) -> ir.Value:
        """Return sums of latents [batch, heads, sequence, rank]."""
        sums = self._add(at, "FusedMatMul", [cache, weights], {"transB": 1}, MICROSOFT)
        sizes = [0, heads_of(layer.latent)[1], layer.heads, -1]
        by_head = self._add(at, "Reshape", [sums, self._integers("by_head", *sizes)])
        return self._add(at, "Transpose", [by_head], {"perm": (0, 2, 3, 1)})

    def _add(
        self,
        at: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int | float | tuple[int, ...]] | None = None,
        domain: str = "",
    ) -> ir.Value:
        return insert(self._model, at, op_type, inputs, attributes, domain).outputs[0]


def _keys(model: ir.Model, layer: LatentLayer) -> ir.Value:
    """Return what turns queries into those of latents [heads, own size, rank]."""
    return _expansion(model, layer, "keys", heads_of(layer.own)[1])


def _values(model: ir.Model, layer: LatentLayer) -> ir.Value:
    """Return what turns sums of latents into those of values [heads, rank, value size]."""
    return _expansion(model, layer, "values", layer.value_size)


def _expansion(model: ir.Model, layer: LatentLayer, part: str, size: int) -> ir.Value:
    weight = layer.expansion.weight.const_value
    assert weight is not None
    width = int(weight.shape.numpy()[1])

    def compute() -> np.ndarray:
        by_head = weight.numpy().reshape(layer.heads, -1, width)
        if part == "keys":
            return np.ascontiguousarray(by_head[:, :size])
        return np.ascontiguousarray(by_head[:, -size:].swapaxes(1, 2))

    shape = [layer.heads, size, width] if part == "keys" else [layer.heads, width, size]
    return add_initializer(
        model, lazy_tensor(compute, shape, weight.dtype, f"{weight.name}.{part}")
    )
