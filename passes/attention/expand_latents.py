"""Cache keys and values themselves, not the latents they are made of, where memory is fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from alloc_moe.passes.attention.latent_layers import (
    LatentLayer,
    PairRotation,
    latent_rows,
    match_latent_layers,
    match_pairs,
)
from alloc_moe.passes.attention.layers import (
    ROWS_TO_HEADS,
    free_past_lengths,
    heads_of,
    insert,
    is_transposed,
    producer,
    take_over,
)
from alloc_moe.passes.attention.projections import (
    ZERO,
    Projection,
    match_projection,
    multiply,
    multiply_floats,
    takes_columns,
)
from alloc_moe.passes.base import add_initializer, lazy_tensor, shared_integers

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class _Expanded:
    """A layer, its rotations, and the products before and after that it is rewritten with."""

    layer: LatentLayer
    query: PairRotation
    key: PairRotation
    asking: Projection
    closing: Projection

    @property
    def own(self) -> int:
        """Elements of a head that aren't rotated."""
        return heads_of(self.layer.own)[1]

    @property
    def turned(self) -> int:
        """Elements of a head that are."""
        return heads_of(self.layer.turned)[1]

    @property
    def size(self) -> int:
        """Elements of a head."""
        return self.own + self.turned


class ExpandLatentsPass(ir.passes.InPlacePass):
    """Write latent attention as one whose keys and values are cached, both of one size.

    One product makes a token's keys and values of its latents; another adds to every head what all
    share of the keys. Zeros make values as long as keys: they are rows of the first weight, and
    columns of the weight that takes the result. What is rotated comes first in each head. So all
    that is left is attention as `RotaryGroupAttentionPass` knows it, and weights rearranged.

    All layers or none: it takes rotations of pairs, queries from a weight [out, in], values no
    longer than keys. Weights in blocks keep their integers and scales, unless their blocks would
    have to be cut to fewer than 32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = match_latent_layers(model, _DTYPES)
        found = [match for layer in layers if (match := _match(layer)) is not None]
        if not found or len(found) != len(layers):
            return ir.passes.PassResult(model, modified=False)
        free_past_lengths(model)
        angles = _Angles(model)
        for expanded in found:
            _replace(model, expanded, angles)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        layers = match_latent_layers(model, _DTYPES)
        if layers and all(_match(layer) is not None for layer in layers):
            names = [layer.node.name for layer in layers]
            raise ir.passes.PostconditionError(f"The latents of {names} could be expanded.")


def _match(layer: LatentLayer) -> _Expanded | None:
    query, key = match_pairs(layer.turned), match_pairs(layer.shared)
    if query is None or key is None or layer.factor is not None:
        return None
    if (query.cosine, query.sine) != (key.cosine, key.sine):
        return None
    split = producer(layer.own)
    parts = [] if split is None or split.op_type != "Split" else list(split.outputs)
    asking = _before_heads(split) if parts == [layer.own, query.source] else None
    users = list(layer.attended.consumers())
    closing = match_projection(users[0].outputs[0]) if len(users) == 1 else None
    if asking is None or closing is None or not closing.is_whole:
        return None
    found = _Expanded(layer, query, key, asking, closing)
    fits = found.size % 8 == 0 and layer.value_size <= found.size
    return found if fits and takes_columns(closing, layer.value_size, found.size) else None


def _before_heads(split: ir.Node | None) -> Projection | None:
    """Return the product whose heads are split, through their Reshape and Transpose."""
    transpose = None if split is None else producer(split.inputs[0])
    if transpose is None or not is_transposed(transpose):
        return None
    reshape = producer(transpose.inputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    found = match_projection(reshape.inputs[0])
    alone = found is not None and len(list(found.value.consumers())) == 1
    return found if alone else None


class _Angles:
    """Cosines and sines in the type of what they rotate, made once for all layers."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[ir.Value, ir.Value] = {}

    def like(self, at: ir.Node, angles: ir.Value, heads: ir.Value) -> ir.Value:
        """Return cosines, or sines, in the type of heads, made before a node."""
        if angles.dtype == heads.dtype or heads.dtype is None:
            return angles
        if angles not in self._made:
            cast = insert(self._model, at, "Cast", [angles], {"to": heads.dtype})
            self._made[angles] = _typed(cast.outputs[0], heads)
            self._made[angles].shape = angles.shape
        return self._made[angles]


def _replace(model: ir.Model, expanded: _Expanded, angles: _Angles) -> None:
    layer, at = expanded.layer, expanded.layer.node
    query = _rotated(model, expanded, _asked(model, expanded), angles)
    key, value = _made(model, expanded)
    states = [_rotated(model, expanded, key, angles), value]
    for index, (past, present) in enumerate(zip(layer.past, layer.present, strict=True)):
        for cache in (past, present):
            assert cache.shape is not None
            batch, _, columns, _ = cache.shape
            cache.shape = ir.Shape([batch, layer.heads, columns, expanded.size])
        joined = insert(model, at, "Concat", [past, states[index]], {"axis": -2}).outputs[0]
        take_over(present, joined)
        states[index] = joined
    attributes = {name: attribute.value for name, attribute in at.attributes.items()}
    inputs = [query, *states, at.inputs[3]]
    attended = _typed(insert(model, at, "Attention", inputs, attributes).outputs[0], query)
    _close(model, expanded, attended)


def _asked(model: ir.Model, expanded: _Expanded) -> ir.Value:
    """Return queries [batch, heads, sequence, size], what will be rotated first."""
    product, own = expanded.asking, expanded.own
    by_head = np.arange(product.rows).reshape(expanded.layer.heads, expanded.size)
    mine = np.concatenate([by_head[:, own:], by_head[:, :own]], axis=1).reshape(-1)
    if product.is_whole:
        at, source = expanded.layer.node, product.source
        return _heads(model, expanded, multiply(model, at, source, product, rows=mine))
    # What else the product gives stays where it is.
    whole = product.node.outputs[0]
    assert whole.shape is not None
    rows = np.arange(int(whole.shape[-1]))  # type: ignore[arg-type]
    rows[product.begin : product.begin + product.rows] = product.begin + mine
    made = multiply(model, product.node, product.source, product, rows=rows)
    ir.convenience.replace_all_uses_with(whole, made)
    return _heads(model, expanded, product.value)


def _made(model: ir.Model, expanded: _Expanded) -> tuple[ir.Value, ir.Value]:
    """Return a token's keys and values [batch, heads, sequence, size], not yet rotated."""
    layer, turned = expanded.layer, expanded.turned
    heads, own, size, at = layer.heads, expanded.own, expanded.size, expanded.layer.node
    by_head = np.arange(layer.expansion.rows).reshape(heads, own + layer.value_size)
    rows = np.full((2, heads, size), ZERO)
    rows[0, :, turned:] = by_head[:, :own]
    rows[1, :, : layer.value_size] = by_head[:, own:]
    dtype = layer.latent.dtype
    assert dtype is not None

    def shared_rows() -> np.ndarray:
        ones = np.zeros((2, heads, size, turned), dtype.numpy())
        ones[0, :, :turned] = np.eye(turned, dtype=ones.dtype)
        return ones.reshape(-1, turned)

    width = 2 * heads * size
    name = f"alloc_moe.keys_of_all_heads.{heads}x{size}x{turned}"  # the same for all layers
    ones = model.graph.initializers.get(name)
    if ones is None:
        ones = add_initializer(model, lazy_tensor(shared_rows, (width, turned), dtype, name))
    parts = [
        multiply(
            model,
            at,
            _rows(model, at, layer.latent),
            layer.expansion,
            rows=rows.reshape(-1),
            name="expanded",
        ),
        multiply_floats(model, at, _rows(model, at, expanded.key.source), ones, width),
    ]
    total = _typed(insert(model, at, "Add", parts[::-1]).outputs[0], parts[0])
    total.shape = parts[0].shape
    sizes = shared_integers(model, "keys_and_values", heads * size, heads * size)
    split = insert(model, at, "Split", [total, sizes], {"axis": -1}, outputs=2)
    for value in split.outputs:
        _typed(value, total)
        value.shape = ir.Shape([*parts[0].shape[:-1], heads * size])  # type: ignore[index]
    key, value = (_heads(model, expanded, rows) for rows in split.outputs)
    return key, value


def _close(model: ir.Model, expanded: _Expanded, attended: ir.Value) -> None:
    """Merge the heads, and multiply by the weight that takes them."""
    layer, size = expanded.layer, expanded.size
    at, heads, values = expanded.closing.node, layer.heads, layer.value_size
    blind = next(iter(layer.node.outputs[0].consumers()))
    if blind.op_type == "Where":  # zeros for tokens that see nothing
        zero = ir.tensor(np.zeros((), _numpy(attended)), name=f"{layer.attended.name}.zero")
        given = [blind.inputs[0], add_initializer(model, zero), attended]
        attended = _typed(insert(model, at, "Where", given).outputs[0], attended)
    rows = insert(model, at, "Transpose", [attended], {"perm": ROWS_TO_HEADS}).outputs[0]
    merge = shared_integers(model, "merge_latent_heads", 0, 0, -1)
    merged = _typed(insert(model, at, "Reshape", [rows, merge]).outputs[0], attended)
    assert layer.attended.shape is not None
    merged.shape = ir.Shape([*layer.attended.shape[:2], heads * size])

    columns = np.full((heads, size), ZERO)
    columns[:, :values] = np.arange(heads * values).reshape(heads, values)
    made = multiply(model, at, merged, expanded.closing, columns=columns.reshape(-1))
    take_over(at.outputs[0], made)


def _heads(model: ir.Model, expanded: _Expanded, rows: ir.Value) -> ir.Value:
    """Return [batch, sequence, heads * size] as [batch, heads, sequence, size]."""
    heads, size, at = expanded.layer.heads, expanded.size, expanded.layer.node
    sizes = shared_integers(model, "split_latent_heads", 0, 0, heads, size)
    split = insert(model, at, "Reshape", [rows, sizes]).outputs[0]
    found = insert(model, at, "Transpose", [split], {"perm": ROWS_TO_HEADS}).outputs[0]
    assert rows.shape is not None
    batch, sequence, _ = rows.shape
    _typed(split, rows).shape = ir.Shape([batch, sequence, heads, size])
    _typed(found, rows).shape = ir.Shape([batch, heads, sequence, size])
    return found


def _rotated(model: ir.Model, expanded: _Expanded, heads: ir.Value, angles: _Angles) -> ir.Value:
    at, by = expanded.layer.node, (expanded.query.cosine, expanded.query.sine)
    given = [heads, *(angles.like(at, value, heads) for value in by)]
    attributes = {"interleaved": 1, "rotary_embedding_dim": expanded.turned}
    found = _typed(insert(model, at, "RotaryEmbedding", given, attributes).outputs[0], heads)
    found.shape = heads.shape
    return found


def _rows(model: ir.Model, at: ir.Node, value: ir.Value) -> ir.Value:
    """Return [batch, 1, sequence, size] as [batch, sequence, size]."""
    rows = _typed(latent_rows(model, at, value), value)
    assert value.shape is not None
    batch, _, sequence, size = value.shape
    rows.shape = ir.Shape([batch, sequence, size])
    return rows


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.type = like.type
    return value


def _numpy(value: ir.Value) -> np.dtype:
    assert value.dtype is not None
    return value.dtype.numpy()
