"""Cache keys and values themselves, not the latents they are made of, where memory is fast."""

from __future__ import annotations

from collections.abc import Callable
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
    transposed_weight,
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
from alloc_moe.passes.base import add_initializer, lazy_tensor, shared_integers

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class _Expanded:
    """A layer, its rotations, and the products before and after that it is rewritten with."""

    layer: LatentLayer
    query: PairRotation
    key: PairRotation
    asking: ir.Node
    closing: ir.Node

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
    longer than keys. Quantised projections stay as they are.
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
    closing = list(layer.attended.consumers())
    if asking is None or len(closing) != 1 or not _is_product(closing[0]):
        return None
    found = _Expanded(layer, query, key, asking, closing[0])
    return found if found.size % 8 == 0 and layer.value_size <= found.size else None


def _before_heads(split: ir.Node | None) -> ir.Node | None:
    """Return the product whose heads are split, through their Reshape and Transpose."""
    transpose = None if split is None else producer(split.inputs[0])
    if transpose is None or not is_transposed(transpose):
        return None
    reshape = producer(transpose.inputs[0])
    node = producer(reshape.inputs[0]) if reshape and reshape.op_type == "Reshape" else None
    return node if node is not None and _is_product(node) else None


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and transposed_weight(node.inputs[1]) is not None


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
    heads, own, size = expanded.layer.heads, expanded.own, expanded.size

    def rearranged(weight: np.ndarray) -> np.ndarray:
        by_head = weight.reshape(heads, size, -1)
        return np.concatenate([by_head[:, own:], by_head[:, :own]], axis=1)

    at = expanded.asking
    rows = _product(model, expanded.layer.node, at.inputs[0], at, heads * size, rearranged)
    return _heads(model, expanded, rows)


def _made(model: ir.Model, expanded: _Expanded) -> tuple[ir.Value, ir.Value]:
    """Return a token's keys and values [batch, heads, sequence, size], not yet rotated."""
    layer, turned = expanded.layer, expanded.turned
    heads, own, size, at = layer.heads, expanded.own, expanded.size, expanded.layer.node
    weight = layer.expansion.const_value
    assert weight is not None
    latents = int(weight.shape.numpy()[1])

    def own_rows() -> np.ndarray:
        by_head = weight.numpy().reshape(heads, own + layer.value_size, latents)
        rows = np.zeros((2, heads, size, latents), by_head.dtype)
        rows[0, :, turned:] = by_head[:, :own]
        rows[1, :, : layer.value_size] = by_head[:, own:]
        return rows.reshape(-1, latents)

    def shared_rows() -> np.ndarray:
        rows = np.zeros((2, heads, size, turned), weight.dtype.numpy())
        rows[0, :, :turned] = np.eye(turned, dtype=rows.dtype)
        return rows.reshape(-1, turned)

    width = 2 * heads * size
    repeated = f"alloc_moe.keys_of_all_heads.{heads}x{size}x{turned}"  # the same for all layers
    parts = []
    for source, columns, compute, name in (
        (layer.latent, latents, own_rows, f"{weight.name}.expanded"),
        (expanded.key.source, turned, shared_rows, repeated),
    ):
        given = model.graph.initializers.get(name)
        if given is None:
            tensor = lazy_tensor(compute, (width, columns), weight.dtype, name)
            given = add_initializer(model, tensor)
        parts.append(_multiplied(model, at, _rows(model, at, source), given, width))
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
    at, heads, values = expanded.closing, layer.heads, layer.value_size
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

    def widened(weight: np.ndarray) -> np.ndarray:
        by_head = weight.reshape(-1, heads, values)
        return np.pad(by_head, ((0, 0), (0, 0), (0, size - values)))

    result = at.outputs[0]
    assert result.shape is not None
    made = _product(model, at, merged, at, int(result.shape[-1]), widened)  # type: ignore[arg-type]
    take_over(result, made)


def _product(
    model: ir.Model,
    before: ir.Node,
    source: ir.Value | None,
    old: ir.Node,
    width: int,
    change: Callable[[np.ndarray], np.ndarray],
) -> ir.Value:
    """Return the product of `source` and the changed weight of another product, [out, in]."""
    weight = transposed_weight(old.inputs[1])
    assert weight is not None
    assert source is not None
    tensor = weight.const_value
    assert tensor is not None
    assert source.shape is not None
    columns = source.shape[-1]
    assert isinstance(columns, int)

    def compute() -> np.ndarray:
        return np.ascontiguousarray(change(tensor.numpy())).reshape(width, columns)

    made = lazy_tensor(compute, (width, columns), tensor.dtype, f"{tensor.name}.by_head")
    return _multiplied(model, before, source, add_initializer(model, made), width)


def _multiplied(
    model: ir.Model, at: ir.Node, source: ir.Value, weight: ir.Value, width: int
) -> ir.Value:
    transposed = insert(model, at, "Transpose", [weight], {"perm": (1, 0)}).outputs[0]
    made = _typed(insert(model, at, "MatMul", [source, transposed]).outputs[0], source)
    assert source.shape is not None
    made.shape = ir.Shape([*source.shape[:-1], width])
    return made


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
