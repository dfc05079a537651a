"""Sums normalised in one node, against the same graph before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.passes.fuse_norms import FuseNormsPass

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
FUSED = "SkipSimplifiedLayerNormalization"


def graph(
    *, type_: str = "float", other: str = "b, s, 8", axis: int = -1, output: str = "normal"
) -> ir.Model:
    """Return a sum that is normalised, and added to; `other` is the second summand's shape."""
    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
g ({type_}[b, s, 8] x, {type_}[{other}] y) => ({type_}[b, s, 8] {output}, {type_}[b, s, 8] last)
<{type_}[8] weight = {{1, 2, 3, 4, 5, 6, 7, 8}}>
{{
  total = Add(x, y)
  normal = RMSNormalization<axis={axis}, epsilon=0.001>(total, weight)
  minus = Neg(normal)
  last = Sub(total, minus)
}}
"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("type_", ["float", "float16"])
def test_outputs_stay_the_same(session: Session, rng: np.random.Generator, type_: str) -> None:
    dtype = np.float32 if type_ == "float" else np.float16
    inputs = {name: rng.normal(size=(2, 3, 8)).astype(dtype) for name in "xy"}
    model = graph(type_=type_)
    expected = session(model).run(None, inputs)
    assert FuseNormsPass()(model).modified
    assert operators(model) == [FUSED, "Neg", "Sub"]
    tolerance = 1e-6 if type_ == "float" else 1e-2
    for found, wanted in zip(session(model).run(None, inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_a_sum_nobody_else_reads_is_no_output() -> None:
    model = graph()
    [last] = [node for node in model.graph if node.op_type == "Sub"]
    last.replace_input_with(0, last.inputs[1])
    FuseNormsPass()(model)
    [fused] = [node for node in model.graph if node.op_type == FUSED]
    assert len(fused.outputs) == 1


@pytest.mark.parametrize(
    "other",
    [{"other": "8"}, {"axis": 1}, {"type_": "double"}, {"output": "total"}],
    ids=["broadcast", "two axes", "double", "graph output"],
)
def test_what_the_operator_does_not_take_is_left_alone(other: dict[str, str]) -> None:
    model = graph(**other)  # type: ignore[arg-type]
    assert not FuseNormsPass()(model).modified
    assert operators(model) == ["Add", "RMSNormalization", "Neg", "Sub"]


def test_a_second_run_changes_nothing() -> None:
    model = graph()
    assert FuseNormsPass()(model).modified
    assert not FuseNormsPass()(model).modified


def test_sums_that_are_left_are_reported() -> None:
    model = graph()
    [norm] = [node for node in model.graph if node.op_type == "RMSNormalization"]
    norm.name = "norm"
    with pytest.raises(ir.passes.PostconditionError, match=r"before \['norm'\] are nodes"):
        FuseNormsPass().ensures(model)
