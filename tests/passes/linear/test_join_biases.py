"""Biases of a product's parts are added to the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.linear.join_biases import JoinBiasesPass

Run = Callable[..., list[NDArray[Any]]]


def graph(*, axis: int = -1, second: str = "b") -> ir.Model:
    return ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["": 23]>
        g (float[2, 5] x) => (float[2, 2] y, float[2, 3] z)
        <int64[2] sizes = {{2, 3}}, float[2] a = {{1, 2}}, float[3] b = {{3, 4, 5}}>
        {{
          p, q = Split <axis = {axis}> (x, sizes)
          c = Add (a, p)
          d = Add (q, {second})
          y = Relu (c)
          z = Relu (d)
        }}
        """
    )


def split(model: ir.Model) -> ir.Model:
    """Say what shape inference would."""
    for node in model.graph:
        if node.op_type == "Split":
            for part, width in zip(node.outputs, (2, 3), strict=True):
                part.shape = ir.Shape([2, width])
    return model


def test_all_are_added_at_once(run: Run, rng: np.random.Generator) -> None:
    model = split(graph())
    inputs = {"x": rng.normal(size=(2, 5)).astype(np.float32)}
    expected = run(model, inputs)
    assert JoinBiasesPass()(model).modified
    assert [node.op_type for node in model.graph] == ["Add", "Split", "Relu", "Relu"]
    assert "a+b" in model.graph.initializers
    for one, other in zip(run(model, inputs), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not JoinBiasesPass()(model).modified


@pytest.mark.parametrize("options", [{"second": "q"}, {"axis": 0}], ids=["no bias", "rows"])
def test_others_stay(options: dict[str, Any]) -> None:
    model = split(graph(**options))
    assert not JoinBiasesPass()(model).modified


def test_biases_that_are_left_are_reported() -> None:
    with pytest.raises(ir.passes.PostconditionError, match="could be one each"):
        JoinBiasesPass().ensures(split(graph()))
