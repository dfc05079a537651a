"""Attend to latents themselves, in a preallocated cache that is appended to in place."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.attention.latent_layers import (
    LatentLayer,
    match_latent_layers,
    match_pairs,
)
from alloc_moe.passes.attention.layers import (
    PAST,
    ROWS_TO_HEADS,
    free_past_lengths,
    heads_of,
    insert,
    producer,
    rank,
    take_over,
)
from alloc_moe.passes.base import (
    DOMAIN,
    MICROSOFT,
    OPSET,
    add_function,
    add_initializer,
    lazy_tensor,
)

COLUMNS = "latent_columns"


@script(OPSET, default_opset=op)
def latent_columns(
    attention_mask: INT64[...], input_ids: INT64[...], columns: INT64[...]
) -> tuple[FLOAT[...], INT64[...], INT64[...]]:
    """Say where new tokens go in the cache, and which columns each may attend to.

    Args:
        attention_mask: [batch, total].
        input_ids: [batch, sequence].
        columns: That the cache has room for, one number [1], total at least.

    Returns:
        What is added to the attention scores [batch, 1, sequence, columns]: nothing, or -1e9 for
        padding, later tokens and columns that aren't written yet. Then where in the cache each new
        token goes [batch, sequence, 3], and the sizes batch, sequence and columns [3].
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    total = op.Shape(attention_mask, start=1, end=2)
    sequence = op.Shape(input_ids, start=1, end=2)
    batch = op.Shape(input_ids, start=0, end=1)
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
    return bias, indices, op.Concat(batch, sequence, columns, axis=0)


class LatentAttentionPass(ir.passes.InPlacePass):
    """Compute latent attention on what is cached, not on keys and values made of it at every step.

    A key is W_k latent, so its product with a query is that of the latent with W_k^T query; a value
    is W_v latent, so the sum of values is W_v times the sum of latents (DeepSeek-V2, section
    2.1.2). All layers or none, in float32 without windows. What the graph computes for real tokens
    stays the same up to rounding; for padding tokens it is some finite number instead of zero.

    The cache of a layer is one tensor, ``past_key_values.N.key`` [batch, 1, columns, rank + rotated
    size]. It must have room for the call's tokens: the graph writes them into it, and returns it.
    What it holds beyond must be finite.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = match_latent_layers(model)
        if not layers:
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        free_past_lengths(model)
        builder = _Builder(model, layers[0])
        for layer in layers:
            builder.replace(layer)
        common.RemoveUnusedNodesPass()(model)
        for value in list(model.graph.inputs):
            if (value.name or "").startswith(PAST) and not value.uses():
                model.graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in latent_caches(model):
            past = node.inputs[0]
            assert past is not None
            others = [user for user in past.consumers() if user is not node]
            if not all(user.op_type == "Shape" for user in others):
                raise ir.passes.PostconditionError(
                    f"{past.name} is read by {[user.name for user in others]} too, which don't "
                    "know that its buffer may be longer than the past."
                )


def latent_caches(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that append to caches of latents, in graph order."""
    for node in model.graph:
        past = node.inputs[0] if node.op_type == "ScatterND" else None
        if past is not None and past.is_graph_input() and (past.name or "").startswith(PAST):
            yield node


class _Builder:
    """Replaces layers, which share what is known of columns."""

    def __init__(self, model: ir.Model, first: LatentLayer) -> None:
        self._model = model
        inputs = {value.name: value for value in model.graph.inputs}
        add_function(model, latent_columns)
        room = ir.node("Shape", [first.past[0]], {"start": 2, "end": 3})
        given = [inputs["attention_mask"], inputs["input_ids"], room.outputs[0]]
        node = ir.node(COLUMNS, given, domain=DOMAIN, num_outputs=3, name=COLUMNS)
        for value, name in zip(node.outputs, ("bias", "places", "sizes"), strict=True):
            value.name = f"{DOMAIN}.{name}"
        self._bias, self._places, sizes = node.outputs
        model.graph.insert_before(model.graph[0], [room, node])
        parts = ir.node("Split", [sizes], {"axis": 0, "num_outputs": 3}, num_outputs=3)
        heads = self._constant("heads", [first.heads])
        batch, sequence, columns = parts.outputs
        shape = ir.node("Concat", [batch, heads, sequence, columns], {"axis": 0})
        shape.outputs[0].name = f"{DOMAIN}.scores"
        model.graph.insert_after(node, [parts, shape])
        self._scores = shape.outputs[0]

    def replace(self, layer: LatentLayer) -> None:
        model, at, name = self._model, layer.node, layer.node.outputs[0].name
        width = heads_of(layer.latent)[1] + heads_of(layer.shared)[1]
        turned, new = self._rotated(layer)
        own = self._add(at, "MatMul", [layer.own, _keys(model, layer)])
        query = self._add(at, "Concat", [own, turned], {"axis": -1})
        as_rows = self._constant("as_rows", [0, 1, -1, width])
        rows = self._add(at, "Reshape", [query, as_rows])
        new = self._add(at, "Concat", [self._rows(at, layer.latent), new], {"axis": -1})
        cache = self._append(layer, new, width)
        scores = self._scored(at, cache, rows, layer.scale)
        attended = self._add(at, "MatMul", [scores, cache])
        latents = self._latents(at, attended, layer)
        values = self._add(at, "MatMul", [latents, _values(model, layer)])
        heads = self._add(at, "Transpose", [values], {"perm": ROWS_TO_HEADS})
        merged = self._add(at, "Reshape", [heads, self._constant("merge_heads", [0, 0, -1])])
        merged.name = f"{name}.merged"
        take_over(layer.attended, merged)

    def _rotated(self, layer: LatentLayer) -> tuple[ir.Value, ir.Value]:
        """Return what is rotated of queries, by head, and of keys [batch, sequence, size]."""
        at = layer.node
        query, key = match_pairs(layer.turned), match_pairs(layer.shared)
        if query is None or key is None:
            return layer.turned, self._rows(at, layer.shared)
        # Both come out in another order than before.
        pairs = {"interleaved": 1}
        turned = [query.source, query.cosine, query.sine]
        new = [self._rows(at, key.source), key.cosine, key.sine]
        return (
            self._add(at, "RotaryEmbedding", turned, pairs),
            self._add(at, "RotaryEmbedding", new, {**pairs, "num_heads": 1}),
        )

    def _rows(self, at: ir.Node, value: ir.Value) -> ir.Value:
        """Return [batch, 1, sequence, size] as [batch, sequence, size]."""
        node = producer(value)
        if node is not None and node.op_type == "Reshape" and rank(node.inputs[0]) == 3:
            return node.inputs[0]
        return self._add(at, "Squeeze", [value, self._constant("one_head", [1])])

    def _append(self, layer: LatentLayer, new: ir.Value, width: int) -> ir.Value:
        """Return the cache of both parts with the new tokens written into it."""
        past, present = layer.past[0], layer.present[0]
        for value in (past, present):
            assert value.shape is not None
            value.shape = ir.Shape([*list(value.shape)[:-1], width])
        cache = self._add(layer.node, "ScatterND", [past, self._places, new])
        take_over(present, cache)
        self._model.graph.outputs.remove(layer.present[1])
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
        return self._add(at, "Reshape", [weights, self._constant("join_heads", [0, 1, -1, 0])])

    def _latents(self, at: ir.Node, attended: ir.Value, layer: LatentLayer) -> ir.Value:
        """Return sums of latents alone [batch, heads, sequence, rank]."""
        size = heads_of(layer.latent)[1]
        bounds = [self._constant(f"slice_{end}", [end]) for end in (0, size, 3)]
        cut = self._add(at, "Slice", [attended, *bounds])
        by_head = self._constant("by_head", [0, layer.heads, -1, size])
        return self._add(at, "Reshape", [cut, by_head])

    def _add(
        self,
        at: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int | float | tuple[int, ...]] | None = None,
        domain: str = "",
    ) -> ir.Value:
        return insert(self._model, at, op_type, inputs, attributes, domain).outputs[0]

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        name = f"{DOMAIN}.{name}"
        known = self._model.graph.initializers.get(name)
        return known or add_initializer(
            self._model, ir.tensor(np.array(numbers, np.int64), name=name)
        )


def _keys(model: ir.Model, layer: LatentLayer) -> ir.Value:
    """Return what turns queries into those of latents [heads, own size, rank]."""
    return _expansion(model, layer, "keys", heads_of(layer.own)[1])


def _values(model: ir.Model, layer: LatentLayer) -> ir.Value:
    """Return what turns sums of latents into those of values [heads, rank, value size]."""
    return _expansion(model, layer, "values", layer.value_size)


def _expansion(model: ir.Model, layer: LatentLayer, part: str, size: int) -> ir.Value:
    weight = layer.expansion.const_value
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
