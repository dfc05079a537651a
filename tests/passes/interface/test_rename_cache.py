from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from alloc_moe.passes.interface.rename_cache import RenameCachePass

EXPORTED = ("input.past_key_values.layers.{}.{}s", "output.past_key_values.layers.{}.{}s")
RENAMED = ("past_key_values.{}.{}", "present.{}.{}")


def cached(
    past: str,
    present: str,
    *,
    layers: tuple[int, ...] = (0, 11),
    kinds: tuple[str, ...] = ("key", "value"),
) -> ir.Model:
    """Return a graph that adds a step to each cache tensor."""
    step = ir.val("step", ir.DataType.FLOAT, [1])
    inputs, nodes = [step], []
    for layer in layers:
        for kind in kinds:
            inputs.append(ir.val(past.format(layer, kind), ir.DataType.FLOAT, ["n"]))
            node = ir.node("Add", [inputs[-1], step])
            node.outputs[0].name = present.format(layer, kind)
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].shape = ir.Shape(["n"])
            nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}, name="cached")
    return ir.Model(graph, ir_version=10)


def test_inputs_and_outputs_get_the_names_of_runtimes() -> None:
    model = cached(*EXPORTED)
    assert RenameCachePass()(model).modified
    assert [value.name for value in model.graph.inputs] == [
        "step",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.11.key",
        "past_key_values.11.value",
    ]
    assert [value.name for value in model.graph.outputs] == [
        "present.0.key",
        "present.0.value",
        "present.11.key",
        "present.11.value",
    ]


def test_states_get_the_names_of_runtimes() -> None:
    sides = (f"{side}put.past_key_values.layers.2.{{1}}_states.0" for side in ("in", "out"))
    model = cached(*sides, layers=(2,), kinds=("conv", "recurrent"))
    assert RenameCachePass()(model).modified
    names = [value.name for value in (*model.graph.inputs[1:], *model.graph.outputs)]
    kinds = ("conv_state", "recurrent_state")
    assert names == [
        f"{side}.2.{kind}" for side in ("past_key_values", "present") for kind in kinds
    ]


def test_a_second_run_changes_nothing() -> None:
    model = cached(*EXPORTED)
    RenameCachePass()(model)
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    assert not RenameCachePass()(model).modified
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == names


@pytest.mark.parametrize("name", ["past_key_values.layers.0.keys", "xinput.past_key_values.0.key"])
def test_other_names_stay(name: str) -> None:
    model = cached(*EXPORTED)
    model.graph.inputs[0].name = name
    RenameCachePass()(model)
    assert model.graph.inputs[0].name == name


def test_a_slot_on_one_side_only_is_reported() -> None:
    model = cached(*EXPORTED)
    model.graph.outputs[3].name = "lost"
    with pytest.raises(ir.passes.PostconditionError, match=r"\['11\.value'\] are on one side only"):
        RenameCachePass()(model)


def test_wiring_stays(run: Callable[..., Any], rng: np.random.Generator) -> None:
    values = rng.normal(size=(5, 7)).astype(np.float32)
    model = cached(*EXPORTED)
    names = [value.name for value in model.graph.inputs]
    before = run(model, {"step": values[0, :1], **dict(zip(names[1:], values[1:], strict=True))})
    RenameCachePass()(model)
    names = [value.name for value in model.graph.inputs]
    after = run(model, {"step": values[0, :1], **dict(zip(names[1:], values[1:], strict=True))})
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert [value.name for value in model.graph.outputs] == [
        RENAMED[1].format(layer, kind) for layer in (0, 11) for kind in ("key", "value")
    ]
