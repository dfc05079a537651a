"""Attend on CUDA: GroupQueryAttention that rotates, for rows that are padded on the right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from alloc_moe.passes.attention.group_query import attend, check_pasts
from alloc_moe.passes.attention.layers import (
    ROWS_TO_HEADS,
    AttentionLayer,
    free_past_lengths,
    insert,
    is_transposed,
    match_layers,
    measure_tokens,
    producer,
    rank,
)
from alloc_moe.passes.attention.right_padded import RIGHT_PADDED, right_padded
from alloc_moe.passes.attention.rotary import (
    Angles,
    RotaryTables,
    Rotation,
    match_rotation,
    rotary_tables,
)
from alloc_moe.passes.base import DOMAIN, MICROSOFT, add_function, add_initializer, lazy_tensor

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_OUTPUTS = ("last_column", "columns", "real_tokens", "valid_rows", "lengths")
_HALF_MULTIPLE = 8  # of the rotated half of a head, which the kernel takes


class RotaryGroupAttentionPass(ir.passes.InPlacePass):
    """Replace attention, growing cache and rotary embedding by ``GroupQueryAttention``.

    All layers or none, and none if one has a window or sinks. The graph then takes rows that begin
    with their tokens: `right_padded` says what the attention mask must look like. It has no
    attention bias, which the fast kernels on CUDA don't take. Where cosines and sines depend on
    more than the position, or ``positions`` is None, the rotation stays a node of its own and
    ``position_ids`` an input.

    Bound to one buffer, a cache input and its output may have any capacity. The operator continues
    a batch of several sequences by one token at a time only.

    Args:
        positions: How many the model has.
    """

    def __init__(self, positions: int | None) -> None:
        super().__init__()
        self._positions = positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = match_layers(model, _DTYPES)
        if not layers or any(layer.window or layer.sinks is not None for layer in layers):
            return ir.passes.PassResult(model, modified=False)
        model.opset_imports.setdefault(MICROSOFT, 1)
        builder = _Builder(model, self._positions)
        for layer in layers:
            builder.replace(layer)
        free_past_lengths(model)
        measure_tokens(model)
        common.RemoveUnusedNodesPass()(model)
        for value in list(model.graph.inputs):
            if value.name == "position_ids" and not value.uses():
                model.graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        check_pasts(model)


def right_padded_rows(model: ir.Model) -> ir.Node | None:
    """Return the node that says which tokens of right-padded rows are real, if there is one."""
    found = (node for node in model.graph if node.domain == DOMAIN)
    return next((node for node in found if node.op_type == RIGHT_PADDED), None)


class _Builder:
    """Replaces layers, which share lengths and tables."""

    def __init__(self, model: ir.Model, positions: int | None) -> None:
        self._model = model
        self._positions = positions
        self._tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
        inputs = {value.name: value for value in model.graph.inputs}
        add_function(model, right_padded)
        rows = ir.node(
            RIGHT_PADDED,
            [inputs["attention_mask"], inputs["input_ids"]],
            domain=DOMAIN,
            num_outputs=len(_OUTPUTS),
            name=RIGHT_PADDED,
        )
        for value, name in zip(rows.outputs, _OUTPUTS, strict=True):
            value.name = f"{DOMAIN}.{name}"
        model.graph.insert_before(model.graph[0], rows)
        self._last, self._total = rows.outputs[:2]
        self._merge_shape = add_initializer(
            model, ir.tensor(np.array([0, 0, -1], np.int64), name=f"{DOMAIN}.merge_heads")
        )

    def replace(self, layer: AttentionLayer) -> None:
        at = layer.node
        query, key = match_rotation(at.inputs[0]), match_rotation(layer.key)
        tables = self._shared_tables(query, key, layer.head_size)
        attributes: dict[str, int] = {}
        given: list[ir.Value | None] = [at.inputs[0], layer.key, layer.value]
        if tables is not None and query is not None and key is not None:
            given[:2] = [query.source, key.source]
            attributes = {"do_rotary": 1, "rotary_interleaved": int(query.interleaved)}
        rows = [self._merged(at, value) for value in given if value is not None]
        inputs = [*rows, *layer.past, self._last, self._total, *(tables or ())]
        attend(self._model, layer, inputs, attributes).name = at.name

    def _shared_tables(
        self, query: Rotation | None, key: Rotation | None, head_size: int
    ) -> tuple[ir.Value, ir.Value] | None:
        """Return initializers of cosines and sines, if queries and keys are rotated alike."""
        if query is None or key is None or self._positions is None:
            return None
        by = (query.cosine, query.sine)
        alike = by == (key.cosine, key.sine) and query.size == key.size
        half = query.size // 2
        fits = half % _HALF_MULTIPLE == 0 and half <= head_size // 16 * _HALF_MULTIPLE
        if not alike or query.interleaved != key.interleaved or not fits:
            return None
        if by not in self._tables:
            # One more for a row at its end, whose calls go on with padding.
            tables = rotary_tables(self._model, query, self._positions + 1)
            self._tables[by] = None if tables is None else self._initializers(tables, half)
        return self._tables[by]

    def _initializers(self, tables: RotaryTables, half: int) -> tuple[ir.Value, ir.Value]:
        assert self._positions is not None
        rows, number = self._positions + 1, len(self._tables)

        def initializer(name: str, angles: Angles) -> ir.Value:
            def compute() -> np.ndarray:
                return angles(np.arange(rows))

            name = f"{DOMAIN}.rotary.{number}.{name}"
            return add_initializer(
                self._model, lazy_tensor(compute, (rows, half), tables.dtype, name)
            )

        return initializer("cosine", tables.cosine), initializer("sine", tables.sine)

    def _merged(self, at: ir.Node, value: ir.Value) -> ir.Value:
        """Return [batch, heads, sequence, size] as [batch, sequence, heads * size]."""
        node = value.producer()
        if node is not None and is_transposed(node) and node.inputs[0] is not None:
            rows = node.inputs[0]
            split = producer(rows)
            if split is not None and split.op_type == "Reshape" and rank(split.inputs[0]) == 3:
                assert split.inputs[0] is not None
                return split.inputs[0]
        else:
            rows = insert(self._model, at, "Transpose", [value], {"perm": ROWS_TO_HEADS}).outputs[0]
        merged = insert(self._model, at, "Reshape", [rows, self._merge_shape]).outputs[0]
        merged.type = value.type
        return merged
