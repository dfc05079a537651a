"""Experts on [batch, sequence, hidden] instead of [tokens, hidden], with the same results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.passes.base import MICROSOFT, add_initializer
from alloc_moe.passes.blockwise import BlockFormat, quantize
from alloc_moe.passes.experts.skip_reshapes import SkipReshapesPass

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 16


def experts(shape: str = "b, s, 32", then: str = "Identity(after)") -> ir.Model:
    """Return QMoE between reshapes; router and experts have one each, the second of the first."""
    proto = onnx.parser.parse_model(f"""
<ir_version: 10, opset_import: ["" : 23, "{MICROSOFT}" : 1]>
g (float[{shape}] x) => (float[{shape}] y)
<int64[2] flat = {{-1, {HIDDEN}}}>
{{
  tokens = Reshape(x, flat)
  again = Reshape(tokens, flat)
  logits = Gemm(again, gate)
  probabilities = Softmax(logits)
  mixed = Identity(tokens)
  sizes = Shape(x)
  after = Reshape(mixed, sizes)
  y = {then}
}}
""")
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.from_proto(proto)
    random = np.random.default_rng(4)

    def weight(name: str, *shape: int, bits: int | None = None) -> list[ir.Value]:
        array = random.normal(scale=0.3, size=shape).astype(np.float32)
        arrays = [array] if bits is None else quantize(array, BlockFormat(bits, 16))
        names = (name, f"{name}.scales")
        parts = zip(arrays, names, strict=False)
        return [add_initializer(model, ir.tensor(part, name=label)) for part, label in parts]

    nodes = {node.outputs[0].name: node for node in model.graph}
    nodes["logits"].replace_input_with(1, weight("gate.weight", HIDDEN, EXPERTS)[0])
    gate_up = weight("gate_up", EXPERTS, 2 * INTERMEDIATE, HIDDEN, bits=4)
    down = weight("down", EXPERTS, HIDDEN, INTERMEDIATE, bits=4)
    probabilities = nodes["probabilities"].outputs[0]
    swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0}
    node = ir.node(
        "QMoE",
        [nodes["tokens"].outputs[0], probabilities, *gate_up, None, *down],
        attributes={"k": 2, "expert_weight_bits": 4, "block_size": 16, **swiglu},
        domain=MICROSOFT,
        name="experts",
    )
    old = nodes["mixed"].outputs[0]
    model.graph.insert_before(nodes["mixed"], node)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "moe", old.type, old.shape
    ir.convenience.replace_all_uses_with(old, node.outputs[0])
    model.graph.remove(nodes["mixed"], safe=True)
    nodes["after"].outputs[0].shape = model.graph.inputs[0].shape
    return model


def reshapes(model: ir.Model) -> list[str | None]:
    return [node.outputs[0].name for node in model.graph if node.op_type == "Reshape"]


def test_experts_take_sequences(session: Session) -> None:
    model = experts()
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 3, HIDDEN)).astype(np.float32)}
    (expected,) = session(model).run(None, inputs)
    assert SkipReshapesPass()(model).modified
    [node] = [node for node in model.graph if node.op_type == "QMoE"]
    assert node.inputs[0] is model.graph.inputs[0]
    assert "after" not in reshapes(model)
    [again] = [n for n in model.graph if n.outputs[0].name == "again"]
    assert again.inputs[0] is model.graph.inputs[0]
    (output,) = session(model).run(None, inputs)
    assert output.shape == (2, 3, HIDDEN)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)
    assert not SkipReshapesPass()(model).modified


@pytest.mark.parametrize("shape", ["t, 32", "a, b, c, 32"])
def test_other_ranks_are_left_alone(shape: str) -> None:
    model = experts(shape)
    SkipReshapesPass()(model)
    assert "after" in reshapes(model)


def test_tokens_that_others_read_stay() -> None:
    model = experts(then="Add(after, after)")
    [moe] = [node for node in model.graph if node.op_type == "QMoE"]
    user = ir.node("Identity", moe.outputs)
    model.graph.insert_after(moe, user)
    SkipReshapesPass()(model)
    assert "after" in reshapes(model)


def test_sizes_that_are_copied_are_those_of_the_nearest() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 23]>
g (float[2, 3, 4] x) => (float[6, 2, 2] y)
<int64[2] flat = {6, 4}, int64[3] split = {0, 2, 2}>
{
  rows = Reshape(x, flat)
  y = Reshape(rows, split)
}
""")
    )
    assert not SkipReshapesPass()(model).modified
