"""Products with constant weights, as floats or in blocks, and the same with rows rearranged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from alloc_moe.passes.attention.layers import constant, insert, producer
from alloc_moe.passes.base import MICROSOFT, add_initializer, lazy_parts, lazy_tensor

ZERO = -1
"""In place of a row's or a column's index: a new one of zeros."""
_LEAST_BLOCK = 32  # of what a decode step's kernels read at once


@dataclass(frozen=True)
class Projection:
    """A product with a weight [out, in], or of ``rows`` of it, from ``begin`` on, those of a Split.

    ``node`` is a MatMul with a transposed weight, or a MatMulNBits of 4 or 8 bits without zero
    points; ``value`` is what it gives, or the part of it.
    """

    node: ir.Node
    value: ir.Value
    begin: int
    rows: int

    @property
    def source(self) -> ir.Value:
        """What is multiplied [batch, sequence, in]."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the product."""
        return self.value is self.node.outputs[0]

    @property
    def block(self) -> int | None:
        """How many elements of a row have one scale, None of floats."""
        packed = self.node.op_type == "MatMulNBits"
        return self.node.attributes["block_size"].as_int() if packed else None

    @property
    def weight(self) -> ir.Value:
        """The weight: [out, in], or in blocks [out, in / block, bytes]."""
        found = self.node.inputs[1] if self.block else transposed_weight(self.node.inputs[1])
        assert found is not None
        return found


def match_projection(value: ir.Value | None) -> Projection | None:
    """Return the product that a value is, or is a part of."""
    node, begin, rows = producer(value), 0, None
    if value is not None and node is not None and node.op_type == "Split":
        sizes = constant(node.inputs[1]) if len(node.inputs) == 2 else None
        if sizes is None or node.attributes["axis"].as_int() not in (-1, 2):
            return None
        at = list(node.outputs).index(value)
        begin, rows = sum(sizes[:at]), sizes[at]
        node = producer(node.inputs[0])
    if value is None or node is None:
        return None
    if node.op_type == "MatMulNBits":
        plain = len(node.inputs) == 3 and all(given is not None for given in node.inputs)
        out = node.attributes["N"].as_int() if plain and _are_constant(node.inputs[1:]) else None
    else:
        weight = transposed_weight(node.inputs[1]) if node.op_type == "MatMul" else None
        shape = None if weight is None or weight.const_value is None else weight.const_value.shape
        out = None if shape is None else int(shape.numpy()[0])
    return None if out is None else Projection(node, value, begin, out if rows is None else rows)


def _are_constant(values: Sequence[ir.Value | None]) -> bool:
    return all(value is not None and value.const_value is not None for value in values)


def transposed_weight(value: ir.Value | None) -> ir.Value | None:
    """Return the weight [out, in] that a value is the transpose of."""
    node = producer(value)
    weight = node.inputs[0] if node is not None and node.op_type == "Transpose" else None
    return weight if weight is not None and weight.const_value is not None else None


def takes_columns(projection: Projection, *sizes: int) -> bool:
    """Whether columns can be taken by groups of such sizes: blocks must not be cut too small."""
    block = projection.block
    return block is None or math.gcd(block, *sizes) >= _LEAST_BLOCK


def multiply(
    model: ir.Model,
    before: ir.Node,
    source: ir.Value,
    projection: Projection,
    *,
    rows: NDArray[np.int64] | None = None,
    columns: NDArray[np.int64] | None = None,
    name: str = "by_head",
) -> ir.Value:
    """Return the product of `source` with rows and columns that are taken of a weight.

    In blocks, values and scales stay what they are: columns that follow each other are taken by
    blocks, which are cut to what all groups of them are multiples of.

    Args:
        model: The model.
        before: The node that the new ones come before.
        source: [batch, sequence, in].
        projection: Has the weight.
        rows: Which rows of it in which order, `ZERO` for zeros; None for all as they are.
        columns: The same of columns.
        name: What the new weight's name ends with.
    """
    if projection.block is None:
        return _of_floats(model, before, source, projection, rows, columns, name)
    return _of_blocks(model, before, source, projection, rows, columns, name)


def _of_floats(
    model: ir.Model,
    before: ir.Node,
    source: ir.Value,
    projection: Projection,
    rows: NDArray[np.int64] | None,
    columns: NDArray[np.int64] | None,
    name: str,
) -> ir.Value:
    tensor = projection.weight.const_value
    assert tensor is not None
    shape = _shape(tensor.shape.numpy(), rows, columns)

    def compute() -> np.ndarray:
        return _taken(_taken(tensor.numpy(), rows, 0, 0), columns, 1, 0)

    made = lazy_tensor(compute, shape, tensor.dtype, f"{tensor.name}.{name}")
    return multiply_floats(model, before, source, add_initializer(model, made), shape[0])


def multiply_floats(
    model: ir.Model, before: ir.Node, source: ir.Value, weight: ir.Value, width: int
) -> ir.Value:
    """Return the product of `source` with a weight [width, in]."""
    transposed = insert(model, before, "Transpose", [weight], {"perm": (1, 0)}).outputs[0]
    return _like(insert(model, before, "MatMul", [source, transposed]).outputs[0], source, width)


def _of_blocks(
    model: ir.Model,
    before: ir.Node,
    source: ir.Value,
    projection: Projection,
    rows: NDArray[np.int64] | None,
    columns: NDArray[np.int64] | None,
    name: str,
) -> ir.Value:
    node, old = projection.node, projection.block
    packed, scales = (None if value is None else value.const_value for value in node.inputs[1:])
    assert packed is not None
    assert scales is not None
    assert old is not None
    bits = node.attributes["bits"].as_int()
    block = old if columns is None else _common_block(columns, old)
    given = (packed.shape.numpy()[0], packed.shape.numpy()[1] * old)
    out, width = _shape(given, rows, columns)
    firsts = None if columns is None else columns.reshape(-1, block)[:, 0]
    blocks = firsts if firsts is None else np.where(firsts < 0, ZERO, firsts // block)
    middle = {4: 0x88, 8: 0x80}[bits]  # zeros

    def compute() -> list[np.ndarray]:
        values = _taken(packed.numpy(), rows, 0, middle).reshape(out, -1, block * bits // 8)
        steps = np.repeat(_taken(scales.numpy(), rows, 0, 0), old // block, axis=1)
        return [_taken(values, blocks, 1, middle), _taken(steps, blocks, 1, 0)]

    parts = [
        (f"{packed.name}.{name}", (out, width // block, block * bits // 8), packed.dtype),
        (f"{packed.name}.{name}.scales", (out, width // block), scales.dtype),
    ]
    weights = [add_initializer(model, part) for part in lazy_parts(compute, parts)]
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    attributes |= {"N": out, "K": width, "block_size": block}
    made = insert(model, before, "MatMulNBits", [source, *weights], attributes, MICROSOFT)
    return _like(made.outputs[0], source, out)


def _common_block(columns: NDArray[np.int64], block: int) -> int:
    """Return the most columns, a divisor of a block, that always stay side by side."""
    while block > 1:
        groups = columns.reshape(-1, block) if columns.size % block == 0 else None
        if groups is not None and _stay_together(groups):
            return block
        block //= 2
    return block


def _stay_together(groups: NDArray[np.int64]) -> bool:
    """Whether each group is zeros, or a whole block of what was there."""
    zeros = (groups == ZERO).all(axis=1)
    firsts = groups[:, :1]
    whole = (groups == firsts + np.arange(groups.shape[1])).all(axis=1)
    return bool((zeros | (whole & (firsts[:, 0] % groups.shape[1] == 0))).all())


def _shape(
    shape: Sequence[int], rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None
) -> tuple[int, int]:
    sizes = zip(shape, (rows, columns), strict=True)
    out, width = (int(size) if taken is None else len(taken) for size, taken in sizes)
    return out, width


def _taken(
    values: np.ndarray, indices: NDArray[np.int64] | None, axis: int, zero: int
) -> np.ndarray:
    if indices is None:
        return np.ascontiguousarray(values)
    taken = np.take(values, np.maximum(indices, 0), axis=axis)
    new = indices < 0
    if axis:
        taken[:, new] = zero
    else:
        taken[new] = zero
    return taken


def _like(made: ir.Value, source: ir.Value, width: int) -> ir.Value:
    made.type = source.type
    assert source.shape is not None
    made.shape = ir.Shape([*source.shape[:-1], width])
    return made
