"""Experts with a scaled and clamped gate and biases, in every lowering, against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.gate import swiglu
from alloc_moe.passes.experts.lower import Allocation

EXPERTS, K, HIDDEN, INTERMEDIATE, TOKENS = 4, 2, 64, 32, 9
GATE = {"alpha": 1.702, "beta": 1.0, "limit": 0.75}
Session = Callable[[ir.Model], onnxruntime.InferenceSession]
Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep onnxruntime from rounding activations to 8 bits."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")


@pytest.fixture
def weights(rng: np.random.Generator) -> Weights:
    shapes = {
        "gate_up": (EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "gate_up_bias": (EXPERTS, 2 * INTERMEDIATE),
        "down": (EXPERTS, HIDDEN, INTERMEDIATE),
        "down_bias": (EXPERTS, HIDDEN),
    }
    return {
        name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()
    }


@pytest.fixture
def inputs(rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :K]
    return {
        "input_ids": np.zeros((1, TOKENS), np.int64),
        "hidden": rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32),
        "expert_ids": ids,
        "expert_weights": np.sort(rng.random((TOKENS, K)).astype(np.float32))[:, ::-1].copy(),
    }


def layer(weights: Weights, gate: dict[str, float]) -> ir.Model:
    """Return a graph of one RoutedExperts node."""
    given = [
        ir.val("input_ids", ir.DataType.INT64, ["b", "s"]),
        ir.val("hidden", ir.DataType.FLOAT, ["t", HIDDEN]),
        ir.val("expert_ids", ir.DataType.INT64, ["t", K]),
        ir.val("expert_weights", ir.DataType.FLOAT, ["t", K]),
    ]
    graph = ir.Graph(given, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layer")
    model = ir.Model(graph, ir_version=10)
    values = [add_initializer(model, ir.tensor(weights[name], name=name)) for name in weights]
    attributes = {"layer": 0, "transposed": 0, "interleaved": 1, **gate}
    node = ir.node(
        ROUTED_EXPERTS, [*given[1:], *values], attributes=attributes, domain=DOMAIN, name="experts"
    )
    user = ir.node("Identity", node.outputs)
    user.outputs[0].name, user.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    user.outputs[0].shape = ir.Shape(["t", HIDDEN])
    graph.extend([node, user])
    graph.outputs.append(user.outputs[0])
    return model


def expected(weights: Weights, inputs: dict[str, NDArray[np.generic]]) -> NDArray[np.float64]:
    alpha, beta, limit = GATE.values()
    output = np.zeros((TOKENS, HIDDEN))
    for token, rank in np.ndindex(TOKENS, K):
        expert = int(inputs["expert_ids"][token, rank])
        rows = weights["gate_up"][expert].astype(float) @ inputs["hidden"][token]
        rows += weights["gate_up_bias"][expert]
        gate, up = np.minimum(rows[::2], limit), np.clip(rows[1::2], -limit, limit)
        gated = gate / (1 + np.exp(-alpha * gate)) * (up + beta)
        one = weights["down"][expert] @ gated + weights["down_bias"][expert]
        output[token] += inputs["expert_weights"][token, rank] * one
    return output


@pytest.mark.parametrize("form", [None, BlockFormat(8, 32), BlockFormat(4, 16)], ids=str)
@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_the_gate_is_the_operators_own(
    session: Session,
    weights: Weights,
    inputs: dict[str, NDArray[np.generic]],
    pairs: bool,
    form: BlockFormat | None,
) -> None:
    model = layer(weights, GATE)
    formats = {} if form is None else {0: form}
    specialize_passes(Allocation([K], "none"), pairs=pairs, formats=formats)(model)
    for node in model.graph:  # kernels that don't round activations
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    if form is not None:
        rounded = {n: dequantize(*quantize(weights[n], form), form) for n in ("gate_up", "down")}
        weights = {**weights, **rounded}
    loaded = session(model)
    names = {value.name for value in loaded.get_inputs()}
    (output,) = loaded.run(["y"], {name: inputs[name] for name in names})
    np.testing.assert_allclose(output, expected(weights, inputs), rtol=1e-5, atol=5e-6)


def test_without_attributes_it_is_silu() -> None:
    assert swiglu(ir.node("RoutedExperts", [])) == {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
