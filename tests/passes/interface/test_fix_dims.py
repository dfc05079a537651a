from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.passes.interface.fix_dims import FixDimsPass


def value(name: str, dims: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.val(name, dtype, dims)


def exported() -> ir.Model:
    """Return a graph whose dimensions are called as the exporter calls them."""
    inputs = [
        value("input_ids", ["s44", "s70"], ir.DataType.INT64),
        value("attention_mask", ["s44", "s12"], ir.DataType.INT64),
        value("past_key_values.0.key", ["s44", "2", "s12 - s70", "16"]),
    ]
    ids = ir.node("Cast", [inputs[0]], attributes={"to": 1})
    logits = ir.node("Unsqueeze", [ids.outputs[0], None])
    axis = ir.Value(
        name="axis",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([2]), name="axis"),
    )
    logits.replace_input_with(1, axis)
    present = ir.node("Neg", [inputs[2]])
    for node, name, dims in (
        (logits, "logits", ["s44", "s70", "1"]),
        (present, "present.0.key", ["s44", "2", "s12", "16"]),
    ):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(dims)
    graph = ir.Graph(
        inputs,
        [logits.outputs[0], present.outputs[0]],
        nodes=[ids, logits, present],
        initializers=[axis],
        opset_imports={"": 23},
        name="exported",
    )
    return ir.Model(graph, ir_version=10)


def dims(model: ir.Model) -> dict[str, list[int | str | None]]:
    return {
        str(value.name): [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }


def test_dimensions_get_the_names_of_their_roles() -> None:
    model = exported()
    assert FixDimsPass()(model).modified
    assert dims(model) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 16],
        "logits": ["batch_size", "sequence_length", 1],
        "present.0.key": ["batch_size", 2, "total_sequence_length", 16],
    }


def test_a_second_run_changes_nothing() -> None:
    model = exported()
    FixDimsPass()(model)
    fixed = dims(model)
    assert not FixDimsPass()(model).modified
    assert dims(model) == fixed


def test_a_dimension_without_a_role_is_reported() -> None:
    with pytest.raises(ir.passes.PostconditionError, match="input_ids has the dimension 's44'"):
        FixDimsPass().ensures(exported())


def test_a_value_of_unknown_shape_stays() -> None:
    model = exported()
    model.graph.inputs[2].shape = None
    FixDimsPass()(model)
    assert model.graph.inputs[2].shape is None


def test_outputs_stay(run: Callable[..., Any], rng: np.random.Generator) -> None:
    inputs = {
        "input_ids": rng.integers(0, 9, (3, 4)),
        "attention_mask": np.ones((3, 9), np.int64),
        "past_key_values.0.key": rng.normal(size=(3, 2, 5, 16)).astype(np.float32),
    }
    model = exported()
    before = run(model, inputs)
    FixDimsPass()(model)
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)
