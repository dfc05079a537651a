from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from alloc_moe.passes.interface.keep_logits import KeepLogitsPass

WEIGHT = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
KEEP = "alloc_moe.logits_to_keep"


def head(body: str = "logits = MatMul(hidden, weight)") -> ir.Model:
    """Return a language model head over normalised hidden states."""
    rows = ", ".join("{" + ", ".join(map(str, row)) + "}" for row in [WEIGHT.reshape(-1)])
    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 8] states) => (float[b, s, 5] logits)
<float[8, 5] weight = {rows}, float half = {{0.5}}, int64[2] rank2 = {{-1, 8}}>
{{ hidden = Relu(states)
   {body} }}
"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


@pytest.fixture
def states(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"states": rng.normal(size=(2, 4, 8)).astype(np.float32)}


@pytest.mark.parametrize(
    "body",
    ["logits = MatMul(hidden, weight)", "raw = MatMul(hidden, weight) logits = Mul(raw, half)"],
)
def test_all_logits_are_the_default_and_fewer_are_the_last(
    run: Callable[..., Any], states: dict[str, np.ndarray], body: str
) -> None:
    model = head(body)
    (before,) = run(model, states)
    assert KeepLogitsPass()(model).modified
    (after,) = run(model, states)
    np.testing.assert_array_equal(after, before)
    for keep in (1, 3, 4, 9):
        (last,) = run(model, {**states, KEEP: np.array([keep])})
        np.testing.assert_allclose(last, before[:, -keep:], rtol=1e-6)


def test_the_projection_computes_no_more_than_is_kept() -> None:
    model = head()
    KeepLogitsPass()(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Neg", "Slice", "MatMul"]
    assert model.graph.inputs[-1] is model.graph.initializers[KEEP]
    assert str(model.graph.outputs[0].shape) == "[b,kept_sequence_length,5]"


def test_a_second_run_changes_nothing() -> None:
    model = head()
    KeepLogitsPass()(model)
    assert not KeepLogitsPass()(model).modified


@pytest.mark.parametrize(
    "body",
    ["logits = Identity(hidden)", "flat = Reshape(hidden, rank2) logits = MatMul(flat, weight)"],
)
def test_a_head_of_another_kind_is_left_alone(body: str) -> None:
    assert not KeepLogitsPass()(head(body)).modified
