"""Masks as the exporter writes them: which windows they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.passes.attention.masks import split_sinks, window_of

HEADS = 4


def constant(value: object, dtype: type[np.generic] = np.int64) -> ir.Value:
    return ir.Value(name="c", const_value=ir.tensor(np.asarray(value, dtype)))


def mask(
    farther: str = "Greater",
    later: str = "LessOrEqual",
    before: str = "Sub",
    *,
    other: bool = False,
) -> ir.Value:
    """Return the mask of a window of 8; with `other` its two comparisons are of other things."""
    columns, positions, real = ir.val("columns"), ir.val("positions"), ir.val("real")
    start = ir.node(before, [positions, constant(8)]).outputs[0]
    near = ir.node(farther, [columns, start]).outputs[0]
    seen = ir.node(later, [real if other else columns, positions]).outputs[0]
    both = ir.node("And", [near, seen]).outputs[0]
    return ir.node("And", [both, real]).outputs[0]


def test_a_window_is_found() -> None:
    assert window_of(mask()) == 8


def test_a_causal_mask_has_none() -> None:
    causal = ir.node("LessOrEqual", [ir.val("columns"), ir.val("positions")]).outputs[0]
    assert window_of(ir.node("And", [causal, ir.val("real")]).outputs[0]) == 0


@pytest.mark.parametrize(
    "unknown",
    [
        None,
        ir.val("given"),
        mask(farther="GreaterOrEqual"),
        mask(later="Less"),
        mask(before="Add"),
        mask(other=True),
        mask(farther="LessOrEqual"),
        ir.node("And", [mask(), mask()]).outputs[0],
    ],
)
def test_masks_of_another_kind_are_none_that_is_known(unknown: ir.Value | None) -> None:
    assert window_of(unknown) is None


def test_sinks_are_split_off() -> None:
    rest, sinks = ir.val("rest"), constant([[[[1.0]], [[2.0]], [[3.0]], [[4.0]]]], np.float32)
    column = ir.node("Expand", [sinks, ir.val("shape")]).outputs[0]
    both = ir.node("Concat", [rest, column], attributes={"axis": -1}).outputs[0]
    found, tensor = split_sinks(both, HEADS)
    assert found is rest
    assert tensor is not None
    assert tensor.numpy().reshape(-1).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "column", [ir.val("computed"), constant([1.0, 2.0], np.float32)], ids=["unknown", "two"]
)
def test_other_columns_stay(column: ir.Value) -> None:
    both = ir.node("Concat", [ir.val("rest"), column], attributes={"axis": -1}).outputs[0]
    assert split_sinks(both, HEADS) == (both, None)
