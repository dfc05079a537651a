"""Products of the same values joined to one, against the same graph before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from alloc_moe.passes.base import MICROSOFT, add_initializer, lazy_tensor
from alloc_moe.passes.blockwise import BlockFormat, quantize
from alloc_moe.passes.linear.fuse_projections import FuseProjectionsPass

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
COLUMNS, BLOCK = 64, 32
INPUTS = {"x": np.random.default_rng(3).normal(size=(2, 3, COLUMNS)).astype(np.float32)}


def graph(
    rows: dict[str, int],
    *,
    biased: tuple[str, ...] = (),
    bits: dict[str, int] | None = None,
    read: list[str] | None = None,
) -> ir.Model:
    """Return linear layers of x [b, s, 64], each an output through Neg; `read` notes weights."""
    x = ir.val("x", ir.DataType.FLOAT, ["b", "s", COLUMNS])
    imports = {"": 23, MICROSOFT: 1}
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports=imports, name="g"), ir_version=10)
    random = np.random.default_rng(2)
    for name, count in rows.items():
        form = BlockFormat((bits or {}).get(name, 4), BLOCK)
        weight = random.normal(size=(count, COLUMNS)).astype(np.float32)
        packed, scales = quantize(weight, form)
        packed = packed.reshape(count, COLUMNS // BLOCK, -1)

        def compute(packed: np.ndarray = packed, name: str = name) -> np.ndarray:
            if read is not None:
                read.append(name)
            return packed

        lazy = lazy_tensor(compute, packed.shape, ir.DataType.UINT8, name)
        inputs = [x, add_initializer(model, lazy)]
        inputs.append(add_initializer(model, ir.tensor(scales, name=f"{name}.scales")))
        if name in biased:
            bias = random.normal(size=count).astype(np.float32)
            inputs += [None, None, add_initializer(model, ir.tensor(bias, name=f"{name}.bias"))]
        attributes = {"N": count, "K": COLUMNS, "bits": form.bits, "block_size": BLOCK}
        node = ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT, name=name)
        user = ir.node("Neg", node.outputs)
        for value, label in ((node.outputs[0], f"{name}.y"), (user.outputs[0], f"minus.{name}")):
            value.name, value.type = label, ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape(["b", "s", count])
        model.graph.extend([node, user])
        model.graph.outputs.append(user.outputs[0])
    return model


def products(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("biased", [(), ("q", "k", "v")], ids=["plain", "biased"])
def test_outputs_stay_the_same(session: Session, biased: tuple[str, ...]) -> None:
    rows = {"q": 64, "k": 32, "v": 16}
    model = graph(rows, biased=biased)
    expected = session(model).run(None, INPUTS)
    assert FuseProjectionsPass()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "Split", *["Neg"] * 3]
    assert products(model) == ["q+k+v"]
    for output, wanted in zip(session(model).run(None, INPUTS), expected, strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-6, atol=1e-6)
    [joined] = [n.outputs[0] for n in model.graph if n.op_type == "MatMulNBits"]
    assert joined.shape == ir.Shape(["b", "s", 112])


def test_weights_are_read_when_the_joined_one_is() -> None:
    read: list[str] = []
    model = graph({"q": 16, "k": 32}, read=read)
    FuseProjectionsPass()(model)
    assert read == []
    tensor = model.graph.initializers["q+k"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.numpy().shape == tuple(tensor.shape) == (48, 2, 16)
    assert read == ["q", "k"]


def test_only_what_is_alike_is_joined() -> None:
    model = graph({"q": 16, "k": 16, "v": 16, "g": 16}, biased=("q", "v"), bits={"g": 8})
    assert FuseProjectionsPass()(model).modified
    assert products(model) == ["q+v", "k", "g"]


def test_a_weight_that_others_read_is_left_alone() -> None:
    model = graph({"q": 16, "k": 16})
    first, second = (node for node in model.graph if node.op_type == "MatMulNBits")
    for at in (1, 2):
        second.replace_input_with(at, first.inputs[at])
    assert not FuseProjectionsPass()(model).modified


def test_a_second_run_changes_nothing() -> None:
    model = graph({"q": 16, "k": 16})
    assert FuseProjectionsPass()(model).modified
    assert not FuseProjectionsPass()(model).modified


def test_projections_that_are_left_are_reported() -> None:
    with pytest.raises(ir.passes.PostconditionError, match=r"\[\['q', 'k'\]\] could be one each"):
        FuseProjectionsPass().ensures(graph({"q": 16, "k": 16}))
