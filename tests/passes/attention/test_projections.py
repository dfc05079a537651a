"""Rows and columns of weights taken anew: of floats, and of blocks without rounding again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.attention.projections import (
    ZERO,
    Projection,
    match_projection,
    multiply,
    takes_columns,
    transposed_weight,
)
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

ROWS, COLUMNS, BLOCK = 12, 256, 128
REVERSED = np.arange(ROWS)[::-1]
WIDENED = np.full((4, 96), ZERO)  # four groups of 64 columns, each with 32 new ones
WIDENED[:, :64] = np.arange(COLUMNS).reshape(4, 64)
Built = tuple[ir.Model, Projection, NDArray[np.float32]]


def _model(bits: int, *, split: bool = False) -> Built:
    """Return a product, and its weight as it stands for: floats if there are no bits."""
    weight = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    x = ir.val("x", ir.DataType.FLOAT, [1, 3, COLUMNS])
    if bits:
        form = BlockFormat(bits, BLOCK)
        packed, scales = quantize(weight, form)
        weight = dequantize(packed, scales, form)
        packed = packed.reshape(ROWS, COLUMNS // BLOCK, -1)
        given = {"w": packed, "s": scales.reshape(ROWS, COLUMNS // BLOCK)}
        attributes = {"N": ROWS, "K": COLUMNS, "bits": bits, "block_size": BLOCK}
    else:
        given, attributes = {"w": weight}, {}
    constants = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in given.items()
    ]
    nodes = []
    if bits:
        inputs, domain, kind = [x, *constants], "com.microsoft", "MatMulNBits"
    else:
        nodes.append(ir.node("Transpose", constants, attributes={"perm": (1, 0)}))
        inputs, domain, kind = [x, nodes[0].outputs[0]], "", "MatMul"
    nodes.append(ir.node(kind, inputs, attributes=attributes, domain=domain))
    value = nodes[-1].outputs[0]
    if split:
        sizes = ir.tensor(np.array([4, 8]), name="sizes")
        constants.append(ir.Value(name="sizes", const_value=sizes, shape=ir.Shape([2])))
        pair = [value, constants[-1]]
        nodes.append(ir.node("Split", pair, attributes={"axis": -1}, num_outputs=2))
        value = nodes[-1].outputs[1]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 23})
    found = match_projection(value)
    assert found is not None
    return ir.Model(graph, ir_version=10), found, weight


def _weight(made: ir.Value) -> NDArray[np.float32]:
    """Return what the weight of a new product stands for."""
    node = made.producer()
    assert node is not None
    if node.op_type == "MatMul":
        weight = transposed_weight(node.inputs[1])
        assert weight is not None
        return weight.const_value.numpy()  # type: ignore[no-any-return, union-attr]
    names = ("bits", "block_size", "N", "K")
    bits, block, rows, columns = (node.attributes[name].as_int() for name in names)
    packed, scales = (value.const_value.numpy() for value in node.inputs[1:])  # type: ignore[union-attr]
    assert packed.shape == (rows, columns // block, block * bits // 8)
    flat = packed.reshape(rows, -1), scales.reshape(rows, -1)
    found: NDArray[np.float32] = dequantize(*flat, BlockFormat(bits, block))
    return found


def _expected(
    weight: NDArray[np.float32], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float32]:
    taken = np.pad(weight, ((0, 1), (0, 1)))  # the last of both are zeros, which is index -1
    return taken[rows][:, columns]


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("rows", [REVERSED, np.array([3, ZERO, 0, ZERO, 11])], ids=["all", "some"])
def test_rows_are_taken_as_they_are(bits: int, rows: NDArray[np.int64]) -> None:
    model, projection, weight = _model(bits)
    node = projection.node
    made = multiply(model, node, projection.source, projection, rows=rows)
    assert made.shape == ir.Shape([1, 3, len(rows)])
    np.testing.assert_array_equal(_weight(made), _expected(weight, rows, np.arange(COLUMNS)))


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_new_columns_of_zeros_cut_blocks_but_round_nothing(bits: int) -> None:
    model, projection, weight = _model(bits)
    columns = WIDENED.reshape(-1)
    source = ir.val("wide", ir.DataType.FLOAT, [1, 3, columns.size])
    made = multiply(model, projection.node, source, projection, columns=columns)
    np.testing.assert_array_equal(_weight(made), _expected(weight, np.arange(ROWS), columns))
    if bits:
        node = made.producer()
        assert node is not None
        assert node.attributes["block_size"].as_int() == 32


def test_a_part_of_a_split_says_where_its_rows_are() -> None:
    _, projection, _ = _model(4, split=True)
    assert (projection.begin, projection.rows, projection.is_whole) == (4, 8, False)


@pytest.mark.parametrize(("bits", "takes"), [(0, True), (4, False)])
def test_blocks_are_not_cut_to_fewer_than_32(bits: int, takes: bool) -> None:
    _, projection, _ = _model(bits)
    assert takes_columns(projection, 64, 96)
    assert takes_columns(projection, 48, 64) is takes


def _with_zero_points(node: ir.Node) -> None:
    node.resize_inputs(4)
    node.replace_input_with(3, ir.val("zero_points"))


def _with_a_weight_of_no_constant(node: ir.Node) -> None:
    node.replace_input_with(1, ir.val("made"))


@pytest.mark.parametrize("change", [_with_zero_points, _with_a_weight_of_no_constant])
def test_other_products_are_left_alone(change: Callable[[ir.Node], None]) -> None:
    _, projection, _ = _model(4)
    change(projection.node)
    assert match_projection(projection.value) is None
