from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.experts.interleave import InterleaveExpertsPass, interleave_rows

EXPERTS, INTERMEDIATE, HIDDEN = 2, 3, 5
GATE = np.arange(EXPERTS * INTERMEDIATE * HIDDEN, dtype=np.float32).reshape(
    EXPERTS, INTERMEDIATE, HIDDEN
)
UP = GATE + 1000
DOWN = np.arange(EXPERTS * HIDDEN * INTERMEDIATE, dtype=np.float32).reshape(
    EXPERTS, HIDDEN, INTERMEDIATE
)
GATE_BIAS, UP_BIAS = GATE[:, :, 0] + 0.5, UP[:, :, 0] + 0.5

# What onnxruntime wants: gate row 0, up row 0, gate row 1, ...
INTERLEAVED = np.stack([GATE, UP], axis=2).reshape(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
INTERLEAVED_BIAS = np.stack([GATE_BIAS, UP_BIAS], axis=2).reshape(EXPERTS, 2 * INTERMEDIATE)
CONCATENATED = np.concatenate([GATE, UP], axis=1)
CONCATENATED_BIAS = np.concatenate([GATE_BIAS, UP_BIAS], axis=1)


def layer(*, transposed: bool, interleaved: bool, biased: bool) -> ir.Model:
    """Return one RoutedExperts node with weights in the layout of a family."""
    inputs = [
        ir.val("hidden", ir.DataType.FLOAT, ["t", HIDDEN]),
        ir.val("ids", ir.DataType.INT64, ["t", 2]),
        ir.val("weights", ir.DataType.FLOAT, ["t", 2]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layer")
    model = ir.Model(graph, ir_version=10)

    def weight(name: str, array: NDArray[np.float32]) -> ir.Value:
        return add_initializer(model, ir.tensor(np.ascontiguousarray(array), name=name))

    gate_up = INTERLEAVED if interleaved else CONCATENATED
    down = DOWN
    if transposed:
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    bias = weight("bias", INTERLEAVED_BIAS if interleaved else CONCATENATED_BIAS)
    node = ir.node(
        ROUTED_EXPERTS,
        [*inputs, weight("gate_up", gate_up), bias if biased else None, weight("down", down)],
        attributes={"layer": 0, "transposed": int(transposed), "interleaved": int(interleaved)},
        domain=DOMAIN,
        name="experts",
    )
    node.outputs[0].name = "y"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return model


def weights(model: ir.Model) -> list[NDArray[np.float32] | None]:
    [node] = model.graph
    return [
        None if value is None or value.const_value is None else value.const_value.numpy()
        for value in node.inputs[3:6]
    ]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("transposed", "interleaved"), [(False, False), (True, False), (True, True)]
)
def test_every_layout_becomes_that_of_the_operator(
    transposed: bool, interleaved: bool, biased: bool
) -> None:
    model = layer(transposed=transposed, interleaved=interleaved, biased=biased)
    assert InterleaveExpertsPass()(model).modified
    gate_up, bias, down = weights(model)
    np.testing.assert_array_equal(gate_up, INTERLEAVED)
    np.testing.assert_array_equal(down, DOWN)
    assert (bias is not None) == biased
    if biased:
        np.testing.assert_array_equal(bias, INTERLEAVED_BIAS)
    [node] = model.graph
    assert [node.attributes[name].as_int() for name in ("transposed", "interleaved")] == [0, 1]
    declared = [value.shape for value in node.inputs[3:6] if value is not None]
    assert declared == [array.shape for array in weights(model) if array is not None]


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_without_a_gate_become_two(transposed: bool) -> None:
    model = layer(transposed=transposed, interleaved=False, biased=True)
    [node] = model.graph
    node.attributes["gated"] = ir.AttrInt64("gated", 0)
    assert InterleaveExpertsPass()(model).modified
    gate_up, bias, down = weights(model)
    assert gate_up is not None
    assert bias is not None
    assert node.inputs[3] is not None
    assert node.inputs[3].shape == gate_up.shape == (EXPERTS, 4 * INTERMEDIATE, HIDDEN)
    for rows in (gate_up[:, ::2], gate_up[:, 1::2]):
        np.testing.assert_array_equal(rows, CONCATENATED)
    np.testing.assert_array_equal(bias[:, 1::2], CONCATENATED_BIAS)
    np.testing.assert_array_equal(down, DOWN)
    assert not InterleaveExpertsPass()(model).modified


def test_the_layout_of_the_operator_stays() -> None:
    model = layer(transposed=False, interleaved=True, biased=True)
    assert not InterleaveExpertsPass()(model).modified
    assert set(model.graph.initializers) == {"gate_up", "bias", "down"}


def test_a_second_run_changes_nothing() -> None:
    model = layer(transposed=True, interleaved=False, biased=True)
    InterleaveExpertsPass()(model)
    names = set(model.graph.initializers)
    assert not InterleaveExpertsPass()(model).modified
    assert set(model.graph.initializers) == names


def test_experts_that_are_not_interleaved_are_reported() -> None:
    model = layer(transposed=False, interleaved=False, biased=False)
    with pytest.raises(ir.passes.PostconditionError, match="experts of experts are not interleav"):
        InterleaveExpertsPass().ensures(model)


def test_computed_weights_are_refused() -> None:
    model = layer(transposed=False, interleaved=False, biased=False)
    [node] = model.graph
    node.replace_input_with(3, ir.val("computed", ir.DataType.FLOAT, [EXPERTS, 6, HIDDEN]))
    with pytest.raises(ir.passes.PreconditionError, match="Input 3 of experts is no initializer"):
        InterleaveExpertsPass()(model)


def test_rows_alternate() -> None:
    np.testing.assert_array_equal(interleave_rows(CONCATENATED), INTERLEAVED)
    np.testing.assert_array_equal(interleave_rows(CONCATENATED_BIAS), INTERLEAVED_BIAS)
