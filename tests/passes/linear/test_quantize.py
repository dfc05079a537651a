"""Linear layers and embeddings in few bits, against the same graph with rounded floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.passes.base import add_initializer
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize
from alloc_moe.passes.linear.quantize import QuantizeMatMulsPass

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
FORMATS = {"head.weight": BlockFormat(4, 32), "embed.weight": BlockFormat(8, 32)}


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {
        "embed.weight": random.normal(size=(48, 64)).astype(np.float32),
        "head.weight": random.normal(size=(48, 64)).astype(np.float32),
        "gate.weight": random.normal(size=(8, 48)).astype(np.float32),
    }


def graph(given: dict[str, np.ndarray]) -> ir.Model:
    """Return ids -> embedding -> head -> gate, linear layers as the exporter writes them."""
    ids = ir.val("ids", ir.DataType.INT64, ["b", "s"])
    model = ir.Model(
        ir.Graph([ids], [], nodes=[], opset_imports={"": 23}, name="head"), ir_version=10
    )
    value = {name: add_initializer(model, ir.tensor(w, name=name)) for name, w in given.items()}
    gather = ir.node("Gather", [value["embed.weight"], ids], name="embed")
    transpose = ir.node("Transpose", [value["head.weight"]], attributes={"perm": [1, 0]})
    head = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]], name="head")
    turned = ir.node("Transpose", [value["gate.weight"]], attributes={"perm": [1, 0]})
    gate = ir.node("MatMul", [head.outputs[0], turned.outputs[0]], name="gate")
    nodes = (gather, transpose, head, turned, gate)
    model.graph.extend(nodes)
    for name, node in zip(("e", "t", "h", "u", "y"), nodes, strict=True):
        node.outputs[0].name = name
    for node, width in ((head, 48), (gate, 8)):
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["b", "s", width])
        model.graph.outputs.append(node.outputs[0])
    return model


def exact(model: ir.Model) -> ir.Model:
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    return model


def test_outputs_are_those_of_rounded_weights(session: Session) -> None:
    given = weights()
    model = graph(given)
    assert QuantizeMatMulsPass(FORMATS)(model).modified
    assert [n.op_type for n in model.graph if n.op_type != "Transpose"] == [
        "GatherBlockQuantized",
        "MatMulNBits",
        "MatMul",
    ]
    rounded = {
        n: dequantize(*quantize(w, FORMATS[n]), FORMATS[n]) if n in FORMATS else w
        for n, w in given.items()
    }
    ids = {"ids": np.arange(12).reshape(3, 4) * 4}
    found = session(exact(model)).run(None, ids)
    for output, wanted in zip(found, session(graph(rounded)).run(None, ids), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)


def test_activations_are_rounded_where_speed_counts(session: Session) -> None:
    model = graph(weights())
    QuantizeMatMulsPass(FORMATS)(model)
    levels = [n.attributes["accuracy_level"].as_int() for n in model.graph if "N" in n.attributes]
    assert levels == [4]


def test_shared_weights_are_stored_once_per_use() -> None:
    given = weights()
    model = graph(given)
    [gather] = [n for n in model.graph if n.op_type == "Gather"]
    gather.replace_input_with(0, model.graph.initializers["head.weight"])
    QuantizeMatMulsPass({"head.weight": BlockFormat(8, 32)})(model)
    names = sorted(n for n in model.graph.initializers if n.startswith("head.weight.int8"))
    assert names == [
        "head.weight.int8",
        "head.weight.int8.rows",
        "head.weight.int8.rows.scales",
        "head.weight.int8.scales",
    ]


def test_a_gemm_keeps_its_bias(session: Session) -> None:
    given = weights()
    x = ir.val("x", ir.DataType.FLOAT, ["t", 64])
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="g"), ir_version=10)
    bias = np.arange(48, dtype=np.float32)
    constants = {"head.weight": given["head.weight"], "bias": bias}
    values = [add_initializer(model, ir.tensor(v, name=n)) for n, v in constants.items()]
    node = ir.node("Gemm", [x, *values], attributes={"transB": 1}, name="head")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["t", 48])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    assert QuantizeMatMulsPass(FORMATS)(model).modified
    form = FORMATS["head.weight"]
    rounded = dequantize(*quantize(given["head.weight"], form), form)
    inputs = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    (output,) = session(exact(model)).run(None, {"x": inputs})
    np.testing.assert_allclose(output, inputs @ rounded.T + bias, rtol=1e-5, atol=1e-5)


def test_a_second_run_changes_nothing() -> None:
    model = graph(weights())
    quantise = QuantizeMatMulsPass(FORMATS)
    assert quantise(model).modified
    assert not quantise(model).modified


def test_floats_that_are_left_are_reported() -> None:
    with pytest.raises(
        ir.passes.PostconditionError, match=r"\['head.weight', 'embed.weight'\] are still used"
    ):
        QuantizeMatMulsPass(FORMATS).ensures(graph(weights()))
