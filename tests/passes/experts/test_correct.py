"""Corrections folded into experts of every kind, against the arithmetic they stand for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.experts.correct import CorrectExpertsPass, ExpertCorrection

EXPERTS, INTERMEDIATE, HIDDEN = 3, 4, 5
RANDOM = np.random.default_rng(0)
DOWN = RANDOM.standard_normal((EXPERTS, HIDDEN, INTERMEDIATE), np.float32)
DOWN_BIAS = RANDOM.standard_normal((EXPERTS, HIDDEN), np.float32)
SCALE = RANDOM.standard_normal(HIDDEN, np.float32)
BIAS = RANDOM.standard_normal((EXPERTS, HIDDEN), np.float32)
INNER = RANDOM.standard_normal((EXPERTS, INTERMEDIATE), np.float32)


def layers(count: int, *, biased: bool, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """Return RoutedExperts nodes, one after the other, whose weights are the same."""
    inputs = [
        ir.val("hidden", dtype, ["t", HIDDEN]),
        ir.val("ids", ir.DataType.INT64, ["t", 2]),
        ir.val("weights", dtype, ["t", 2]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layers")
    model = ir.Model(graph, ir_version=10)

    def weight(name: str, array: NDArray[np.float32]) -> ir.Value:
        return add_initializer(model, ir.tensor(array.astype(dtype.numpy()), dtype, name=name))

    gate_up = np.zeros((EXPERTS, 2 * INTERMEDIATE, HIDDEN), np.float32)
    hidden = inputs[0]
    for index in range(count):
        last = [weight(f"down_bias.{index}", DOWN_BIAS)] if biased else []
        node = ir.node(
            ROUTED_EXPERTS,
            [
                hidden,
                *inputs[1:],
                weight(f"gate_up.{index}", gate_up),
                None,
                weight(f"down.{index}", DOWN),
                *last,
            ],
            attributes={"layer": index, "transposed": 0, "interleaved": 1},
            domain=DOMAIN,
            name=f"experts.{index}",
        )
        hidden = node.outputs[0]
        graph.append(node)
    graph.outputs.append(hidden)
    return model


def tensors(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the down projections and their biases, zero where there are none."""
    down, bias = (*node.inputs[5:7], None)[:2]
    assert down is not None
    assert down.const_value is not None
    found = np.zeros((EXPERTS, HIDDEN)) if bias is None else bias.const_value.numpy()  # type: ignore[union-attr]
    return down.const_value.numpy().astype(np.float64), found.astype(np.float64)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_each_expert_is_scaled_and_shifted(biased: bool, with_bias: bool) -> None:
    model = layers(2, biased=biased)
    correction = ExpertCorrection(SCALE, BIAS if with_bias else None)
    assert CorrectExpertsPass({1: correction})(model).modified
    first, second = model.graph
    np.testing.assert_array_equal(tensors(first)[0], DOWN)
    down, bias = tensors(second)
    before = np.einsum("ehi,ei->eh", DOWN.astype(np.float64), INNER) + biased * DOWN_BIAS
    expected = SCALE * before + (BIAS if with_bias else 0)
    np.testing.assert_allclose(
        np.einsum("ehi,ei->eh", down, INNER) + bias, expected, rtol=1e-5, atol=1e-6
    )
    assert len(first.inputs) == (7 if biased else 6)
    assert (len(second.inputs) == 7) == (biased or with_bias)


def test_layers_without_a_correction_stay() -> None:
    model = layers(2, biased=False)
    names = [[value and value.name for value in node.inputs] for node in model.graph]
    assert not CorrectExpertsPass({})(model).modified
    assert not CorrectExpertsPass({5: ExpertCorrection(SCALE, None)})(model).modified
    assert [[value and value.name for value in node.inputs] for node in model.graph] == names


def test_half_precision_stays_half() -> None:
    model = layers(1, biased=False, dtype=ir.DataType.FLOAT16)
    CorrectExpertsPass({0: ExpertCorrection(SCALE, BIAS)})(model)
    [node] = model.graph
    assert [value.dtype for value in node.inputs[5:7] if value] == [ir.DataType.FLOAT16] * 2
    down, bias = tensors(node)
    expected = (DOWN.astype(np.float16).astype(np.float32) * SCALE[:, None]).astype(np.float16)
    np.testing.assert_array_equal(down, expected)
    np.testing.assert_array_equal(bias, BIAS.astype(np.float16))


def test_bfloat16_stays_bfloat16() -> None:
    model = layers(1, biased=True, dtype=ir.DataType.BFLOAT16)
    CorrectExpertsPass({0: ExpertCorrection(SCALE, BIAS)})(model)
    [node] = model.graph
    assert [value.dtype for value in node.inputs[5:7] if value] == [ir.DataType.BFLOAT16] * 2
    down, bias = tensors(node)
    np.testing.assert_allclose(down, DOWN * SCALE[:, None], rtol=2**-6)
    np.testing.assert_allclose(bias, DOWN_BIAS * SCALE + BIAS, rtol=2**-6, atol=2**-6)


def test_weights_that_two_nodes_share_are_corrected_for_one() -> None:
    model = layers(2, biased=False)
    first, second = model.graph
    shared = first.inputs[5]
    second.replace_input_with(5, shared)
    CorrectExpertsPass({1: ExpertCorrection(SCALE, None)})(model)
    np.testing.assert_array_equal(tensors(first)[0], DOWN)
    np.testing.assert_allclose(tensors(second)[0], DOWN * SCALE[:, None], rtol=1e-6)


def test_computed_weights_are_refused() -> None:
    model = layers(1, biased=False)
    [node] = model.graph
    node.replace_input_with(5, ir.val("computed", ir.DataType.FLOAT, [EXPERTS, HIDDEN, 4]))
    with pytest.raises(ir.passes.PreconditionError, match=r"down projection of experts\.0 is no"):
        CorrectExpertsPass({0: ExpertCorrection(SCALE, None)})(model)
