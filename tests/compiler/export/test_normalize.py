"""Graphs before any plan."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from alloc_moe.compiler.errors import (
    UnsupportedModelError,
)
from alloc_moe.compiler.export import normalize
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Compiled

Compile = Callable[..., Compiled]


def test_state_that_runtimes_cant_carry_is_refused(
    moe_model: Callable[[str], MoeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ir.val("input.past_key_values.layers.0.conv_states.1", ir.DataType.FLOAT, ["b", 4])
    node = ir.node("Identity", [state])
    node.outputs[0].name = "logits"
    node.outputs[0].type, node.outputs[0].shape = state.type, state.shape
    graph = ir.Graph([state], node.outputs, nodes=[node], opset_imports={"": 23}, name="graph")
    model = ir.Model(graph, ir_version=10)
    monkeypatch.setattr(normalize, "export_graph", lambda *_, **__: model)
    with pytest.raises(
        UnsupportedModelError,
        match=r"olmoe keeps more than keys, values and one state of each kind \(",
    ):
        export_model(moe_model("olmoe"), dtype="float32")
