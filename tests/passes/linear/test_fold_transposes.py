from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import add_initializer, lazy_tensor
from alloc_moe.passes.linear.fold_transposes import FoldTransposesPass

WEIGHT = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)


class Counter:
    """Makes a weight, and counts how often."""

    def __init__(self, weight: NDArray[np.float32]) -> None:
        self.calls = 0
        self._weight = weight

    def __call__(self) -> NDArray[np.float32]:
        self.calls += 1
        return self._weight


def multiplied(
    weight: NDArray[np.float32], perm: list[int] | None, *, copies: int = 1
) -> tuple[ir.Model, Counter]:
    """Return y = x @ Transpose(weight), `copies` times, each with a Transpose of its own."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="g"), ir_version=10)
    counter = Counter(weight)
    source = add_initializer(model, lazy_tensor(counter, weight.shape, ir.DataType.FLOAT, "weight"))
    x = ir.val("x", ir.DataType.FLOAT, None)
    model.graph.inputs.append(x)
    for copy in range(copies):
        attributes = None if perm is None else {"perm": perm}
        transpose = ir.node("Transpose", [source], attributes=attributes)
        product = ir.node("MatMul", [x, transpose.outputs[0]])
        product.outputs[0].name = f"y{copy}"
        product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.extend([transpose, product])
        model.graph.outputs.append(product.outputs[0])
    return model, counter


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("perm", [None, [1, 0]])
def test_a_transposed_weight_becomes_an_initializer(
    perm: list[int] | None, run: Callable[..., Any], rng: np.random.Generator
) -> None:
    x = rng.normal(size=(2, 5)).astype(np.float32)
    model, _ = multiplied(WEIGHT, perm)
    before = run(model, {"x": x})
    assert FoldTransposesPass()(model).modified
    assert operators(model) == ["MatMul"]
    np.testing.assert_allclose(run(model, {"x": x}), before, rtol=1e-6)
    np.testing.assert_allclose(run(model, {"x": x})[0], x @ WEIGHT.T, rtol=1e-5)


def test_any_order_of_axes_is_kept() -> None:
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    model, _ = multiplied(weight, [2, 0, 1])
    FoldTransposesPass()(model)
    folded = model.graph.initializers["weight.transposed.201"].const_value
    assert folded is not None
    np.testing.assert_array_equal(folded.numpy(), weight.transpose(2, 0, 1))
    assert folded.shape == (4, 2, 3)


def test_the_weight_is_not_read_before_it_is_written() -> None:
    model, counter = multiplied(WEIGHT, None)
    FoldTransposesPass()(model)
    assert counter.calls == 0
    ir.to_proto(model)
    assert counter.calls > 0


def test_transposes_of_one_weight_share_their_result() -> None:
    model, _ = multiplied(WEIGHT, [1, 0], copies=3)
    FoldTransposesPass()(model)
    assert operators(model) == ["MatMul"] * 3
    assert set(model.graph.initializers) == {"weight", "weight.transposed.10"}


def test_a_second_run_changes_nothing() -> None:
    model, _ = multiplied(WEIGHT, None)
    FoldTransposesPass()(model)
    assert not FoldTransposesPass()(model).modified


def test_a_transposed_activation_stays() -> None:
    model, _ = multiplied(WEIGHT, None)
    transpose = ir.node("Transpose", [model.graph.inputs[0]])
    model.graph.append(transpose)
    FoldTransposesPass()(model)
    assert operators(model) == ["MatMul", "Transpose"]


def test_a_transposed_weight_that_is_left_is_reported() -> None:
    model, _ = multiplied(WEIGHT, None)
    with pytest.raises(ir.passes.PostconditionError, match=r"The weights \['weight'\] are still"):
        FoldTransposesPass().ensures(model)
