"""Quantised MoE layers, lowered in every way, against a loop over the rounded experts in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.correct import ExpertCorrection
from alloc_moe.passes.experts.lower import ROUTER_PROBS, ROUTER_WEIGHTS, Allocation
from alloc_moe.passes.experts.quantize import QuantizeExpertsPass, expert_format
from alloc_moe.runtime.artifact import plan as artifact

EXPERTS, CANDIDATES, HIDDEN, INTERMEDIATE = 8, 4, 64, 32
Session = Callable[[ir.Model], onnxruntime.InferenceSession]
Array = NDArray[np.float32]
FORMATS = [BlockFormat(bits, block) for bits in (4, 8) for block in (16, 32)]
CORRECTION = ExpertCorrection(
    np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32),
    np.linspace(-1, 1, EXPERTS * HIDDEN, dtype=np.float32).reshape(EXPERTS, HIDDEN),
)


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep onnxruntime from rounding activations to 8 bits."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")


@dataclasses.dataclass(frozen=True)
class Experts:
    gate_up: Array  # [E, 2I, H], interleaved
    down: Array  # [E, H, I]

    @classmethod
    def random(cls) -> Experts:
        random = np.random.default_rng(5)
        shapes = (EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)
        return cls(*(random.normal(scale=0.2, size=s).astype(np.float32) for s in shapes))

    def rounded(self, form: BlockFormat) -> Experts:
        weights = (self.gate_up, self.down)
        return Experts(*(dequantize(*quantize(weight, form), form) for weight in weights))

    def __call__(self, expert: int, hidden: Array) -> NDArray[np.float64]:
        rows = self.gate_up[expert].astype(np.float64) @ hidden
        gate, up = rows[0::2], rows[1::2]
        output: NDArray[np.float64] = self.down[expert] @ (gate / (1 + np.exp(-gate)) * up)
        return output


def layer(experts: Experts, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    inputs = [
        ir.val("input_ids", ir.DataType.INT64, ["b", "s"]),
        ir.val("attention_mask", ir.DataType.INT64, ["b", "total"]),
        ir.val("hidden", dtype, ["t", HIDDEN]),
        ir.val("expert_ids", ir.DataType.INT64, ["t", CANDIDATES]),
        ir.val("expert_weights", dtype, ["t", CANDIDATES]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layer")
    model = ir.Model(graph, ir_version=10)
    gate_up, down = (
        add_initializer(model, ir.tensor(array.astype(dtype.numpy()), dtype, name=name))
        for name, array in (("gate_up", experts.gate_up), ("down", experts.down))
    )
    node = ir.node(
        ROUTED_EXPERTS,
        [*inputs[2:], gate_up, None, down],
        attributes={"layer": 0, "transposed": 0, "interleaved": 1},
        domain=DOMAIN,
        name="experts",
    )
    user = ir.node("Identity", node.outputs)
    user.outputs[0].name, user.outputs[0].type = "y", ir.TensorType(dtype)
    user.outputs[0].shape = ir.Shape(["t", HIDDEN])
    graph.extend([node, user])
    graph.outputs.append(user.outputs[0])
    return model


def inputs(tokens: int, padding: int = 0) -> dict[str, NDArray[Any]]:
    """Return one row of `tokens`, the first of them padding."""
    random = np.random.default_rng(tokens)
    scores = random.random((tokens, EXPERTS)).astype(np.float32)
    ids = random.permuted(np.argsort(-scores, axis=1)[:, :CANDIDATES], axis=1)
    mask = np.ones((1, tokens), np.int64)
    mask[:, :padding] = 0
    return {
        "input_ids": np.zeros((1, tokens), np.int64),
        "attention_mask": mask,
        "hidden": random.normal(size=(tokens, HIDDEN)).astype(np.float32),
        "expert_ids": ids,
        "expert_weights": np.take_along_axis(scores, ids, axis=1),
    }


def expected(experts: Experts, given: dict[str, NDArray[Any]], k: int) -> NDArray[np.float64]:
    """Return plain top-k of the real tokens, zeros for padding."""
    output = np.zeros_like(given["hidden"], np.float64)
    for token in np.flatnonzero(given["attention_mask"][0]):
        weights, ids = given["expert_weights"][token], given["expert_ids"][token]
        for rank in np.argsort(-weights)[:k]:
            output[token] += weights[rank] * experts(int(ids[rank]), given["hidden"][token])
    return output


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("k", [1, 3, CANDIDATES])
def test_output_is_that_of_rounded_experts(
    session: Session, k: int, form: BlockFormat, pairs: bool
) -> None:
    experts = Experts.random()
    model = layer(experts)
    specialize_passes(Allocation([k], "none"), pairs=pairs, formats={0: form})(model)
    for given in (inputs(1), inputs(9), inputs(7, padding=3)):
        (output,) = session(model).run(None, given)
        wanted = expected(experts.rounded(form), given, k)
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=3e-5)


def test_one_wrong_value_is_noticed(session: Session) -> None:
    experts, form = Experts.random(), BlockFormat(4, 32)
    given = inputs(4)
    wanted = expected(experts.rounded(form), given, 2)
    used = int(given["expert_ids"][0, np.argmax(given["expert_weights"][0])])
    experts.gate_up[used, 0] *= 1.01
    model = layer(experts)
    specialize_passes(Allocation([2], "none"), pairs=False, formats={0: form})(model)
    (output,) = session(model).run(None, given)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_corrections_change_the_scales_alone(session: Session, pairs: bool) -> None:
    experts, form = Experts.random(), BlockFormat(4, 32)
    rounded = experts.rounded(form)
    model = layer(experts)
    passes = specialize_passes(
        Allocation([2], "none"), pairs=pairs, formats={0: form}, corrections={0: CORRECTION}
    )
    passes(model)
    given = inputs(5)
    (output,) = session(model).run(None, given)

    class Corrected(Experts):
        def __call__(self, expert: int, hidden: Array) -> NDArray[np.float64]:
            assert CORRECTION.bias is not None
            return rounded(expert, hidden) * CORRECTION.scale + CORRECTION.bias[expert]

    wanted = expected(Corrected(rounded.gate_up, rounded.down), given, 2)
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=5e-5)
    (down,) = [v for n, v in model.graph.initializers.items() if n == "down.int4"]
    assert down.const_value is not None
    np.testing.assert_array_equal(down.const_value.numpy(), quantize(experts.down, form)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_runs_on_the_cpu(session: Session, bits: int) -> None:
    random, form = Experts.random(), BlockFormat(bits, 32)
    halves_of = (weight.astype(np.float16) for weight in (random.gate_up, random.down))
    experts = Experts(*(half.astype(np.float32) for half in halves_of))
    model = layer(experts, ir.DataType.FLOAT16)
    specialize_passes(Allocation([2], "none"), pairs=True, formats={0: form})(model)
    given = inputs(5)
    halves = {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in given.items()}
    (output,) = session(model).run(None, halves)
    wanted = expected(experts.rounded(form), given, 2)
    assert output.dtype == np.float16
    np.testing.assert_allclose(output, wanted, rtol=3e-2, atol=3e-2)


def test_what_runs_is_counted_without_padding(session: Session) -> None:
    model = layer(Experts.random())
    formats = {0: BlockFormat(4, 32)}
    specialize_passes(Allocation([2], "batch"), pairs=False, formats=formats)(model)
    [value] = [
        v for n in model.graph for v in n.outputs if v.name == ROUTER_WEIGHTS.format(layer=0)
    ]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["t", EXPERTS])
    model.graph.outputs.append(value)
    given = inputs(7, padding=3)
    given["expert_weights"][5] = 0  # a router may give no weight; the candidates still count
    _, weights = session(model).run(None, given)
    assert np.count_nonzero(weights) == 2 * 4


def test_a_second_run_changes_nothing() -> None:
    model = layer(Experts.random())
    quantise = QuantizeExpertsPass({0: BlockFormat(4, 32)})
    assert quantise(model).modified
    assert not quantise(model).modified
    [node] = [n for n in model.graph if n.op_type == ROUTED_EXPERTS]
    assert expert_format(node) == BlockFormat(4, 32)


def test_layers_not_listed_stay_floats() -> None:
    model = layer(Experts.random())
    assert not QuantizeExpertsPass({1: BlockFormat(4, 32)})(model).modified
    specialize_passes(Allocation([2], "none"), pairs=False)(model)
    assert "MoE" in {node.op_type for node in model.graph}
    names = {v.name for node in model.graph for v in node.outputs}
    assert ROUTER_PROBS.format(layer=0) in names


def test_blocks_that_do_not_divide_a_row_are_reported() -> None:
    with pytest.raises(ir.passes.PreconditionError, match=r"rows of 32, which blocks of 64 don't"):
        QuantizeExpertsPass({0: BlockFormat(4, 64)})(layer(Experts.random()))


def test_experts_that_are_left_are_reported() -> None:
    quantise = QuantizeExpertsPass({0: BlockFormat(4, 32)})
    with pytest.raises(ir.passes.PostconditionError, match="experts are None, not BlockFormat"):
        quantise.ensures(layer(Experts.random()))


def test_passes_and_runtime_agree_on_the_counted_value() -> None:
    assert artifact.ROUTER_WEIGHTS == ROUTER_WEIGHTS


def test_weights_are_rounded_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    from alloc_moe.passes.experts import quantize as quantize_experts

    calls: list[int] = []

    def count(*given: Any) -> Any:
        calls.append(1)
        return quantize(*given)

    monkeypatch.setattr(quantize_experts, "quantize", count)
    model = layer(Experts.random())
    QuantizeExpertsPass({0: BlockFormat(4, 32)})(model)
    for name in ("gate_up.int4", "gate_up.int4.scales", "down.int4", "down.int4.scales"):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        tensor.numpy()
    assert len(calls) == 2
