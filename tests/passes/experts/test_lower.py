"""One MoE layer, lowered in every way, against a loop over experts in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.records import Redistribution, Weights
from alloc_moe.compiler.reference.policies import (
    LayerParameters,
    adjust_weights,
    keep_mask,
    rank_candidates,
)
from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts import lower as lower_experts
from alloc_moe.passes.experts.lower import Allocation, LowerExpertsPass
from alloc_moe.runtime.artifact import plan as artifact

EXPERTS, CANDIDATES, HIDDEN, INTERMEDIATE = 8, 4, 16, 12
PROBS = artifact.ROUTER_PROBS.format(layer=0)
RTOL, ATOL = 1e-5, 2e-6

Session = Callable[[ir.Model], onnxruntime.InferenceSession]


@dataclass(frozen=True)
class Experts:
    """Weights of a layer, gate and up interleaved."""

    gate_up: NDArray[np.float32]  # [E, 2I, H]
    gate_up_bias: NDArray[np.float32] | None  # [E, 2I]
    down: NDArray[np.float32]  # [E, H, I]
    down_bias: NDArray[np.float32] | None  # [E, H]

    def __call__(self, expert: int, hidden: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = self.gate_up[expert].astype(np.float64) @ hidden
        if self.gate_up_bias is not None:
            rows = rows + self.gate_up_bias[expert]
        gate, up = rows[0::2], rows[1::2]
        silu = gate / (1 + np.exp(-gate))
        output: NDArray[np.float64] = self.down[expert].astype(np.float64) @ (silu * up)
        return output if self.down_bias is None else output + self.down_bias[expert]


def random_experts(*, biased: bool = False) -> Experts:
    random = np.random.default_rng(7)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.normal(scale=0.4, size=shape).astype(np.float32)

    return Experts(
        normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        normal(EXPERTS, 2 * INTERMEDIATE) if biased else None,
        normal(EXPERTS, HIDDEN, INTERMEDIATE),
        normal(EXPERTS, HIDDEN) if biased else None,
    )


@dataclass(frozen=True)
class Call:
    """What a layer is called with: T = B * S tokens, of which `real` are no padding."""

    real: NDArray[np.bool_]  # [B, S]
    past: int
    hidden: NDArray[np.float32]  # [T, H]
    ids: NDArray[np.int64]  # [T, K]
    weights: NDArray[np.float32]  # [T, K], in the router's order

    def inputs(self) -> dict[str, NDArray[Any]]:
        batch, length = self.real.shape
        past = np.ones((batch, self.past), np.int64)
        return {
            "input_ids": np.zeros((batch, length), np.int64),
            "attention_mask": np.concatenate([past, self.real.astype(np.int64)], axis=1),
            "hidden": self.hidden,
            "expert_ids": self.ids,
            "expert_weights": self.weights,
        }


def call(real: NDArray[np.bool_], *, past: int = 0, levels: int = 0, ordered: bool = False) -> Call:
    """Return random inputs; `levels` > 0 gives weights of so many different values."""
    random = np.random.default_rng(real.size + levels)
    tokens = real.size
    scores = random.random((tokens, EXPERTS)).astype(np.float32)
    if levels:
        scores = np.ceil(scores * levels) / np.float32(levels)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :CANDIDATES]
    if not ordered:
        ids = random.permuted(ids, axis=1)
    weights = np.take_along_axis(scores, ids, axis=1) / np.float32(EXPERTS)
    hidden = random.normal(size=(tokens, HIDDEN)).astype(np.float32)
    return Call(real, past, hidden, ids, weights)


CALLS = {
    "one token": call(np.ones((1, 1), bool), past=6),
    "prompt": call(np.ones((1, 9), bool), ordered=True),
    "left-padded batch": call(np.arange(6)[None] >= np.array([[0], [4], [2]])),
    "decode of a batch": call(np.ones((3, 1), bool), past=4),
    "ties": call(np.arange(7)[None] >= np.array([[0], [3]]), levels=3),
    "pads in the middle": call(np.array([[True, False, True, True], [True, True, False, True]])),
}


def layer(experts: Experts, *, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """Return a graph of one RoutedExperts node whose output is used by another."""
    inputs = [
        ir.val("input_ids", ir.DataType.INT64, ["b", "s"]),
        ir.val("attention_mask", ir.DataType.INT64, ["b", "total"]),
        ir.val("hidden", dtype, ["t", HIDDEN]),
        ir.val("expert_ids", ir.DataType.INT64, ["t", CANDIDATES]),
        ir.val("expert_weights", dtype, ["t", CANDIDATES]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layer")
    model = ir.Model(graph, ir_version=10)

    def weight(name: str, array: NDArray[np.float32] | None) -> ir.Value | None:
        if array is None:
            return None
        return add_initializer(model, ir.tensor(array.astype(dtype.numpy()), dtype, name=name))

    node = ir.node(
        ROUTED_EXPERTS,
        [
            *inputs[2:],
            weight("gate_up", experts.gate_up),
            weight("gate_up_bias", experts.gate_up_bias),
            weight("down", experts.down),
            weight("down_bias", experts.down_bias),
        ],
        attributes={"layer": 0, "transposed": 0, "interleaved": 1},
        domain=DOMAIN,
        name="experts",
    )
    user = ir.node("Identity", node.outputs)
    user.outputs[0].name = "y"
    user.outputs[0].type = ir.TensorType(dtype)
    user.outputs[0].shape = ir.Shape(["t", HIDDEN])
    graph.extend([node, user])
    graph.outputs.append(user.outputs[0])
    return model


def lowered(
    experts: Experts,
    k: int,
    redistribution: str,
    weights: str,
    *,
    pairs: bool,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Model:
    """Return the lowered layer, its router probabilities a second output."""
    model = layer(experts, dtype=dtype)
    assert specialize_passes(Allocation([k], redistribution, weights), pairs=pairs)(model).modified
    [probs] = [v for n in model.graph for v in n.outputs if v.name == PROBS]
    probs.type, probs.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", EXPERTS])
    model.graph.outputs.append(probs)
    return model


def reference(
    experts: Experts, given: Call, k: int, redistribution: Redistribution, weights: Weights
) -> NDArray[np.float64]:
    """Return the layer's output [T, H]."""
    ranked, ids = rank_candidates(torch.from_numpy(given.weights), torch.from_numpy(given.ids))
    real = torch.from_numpy(given.real)
    keep = keep_mask(redistribution, ranked, ids, real, LayerParameters(k))
    scale = adjust_weights(weights, ranked, keep).numpy().astype(np.float64)
    output = np.zeros((len(ids), HIDDEN))
    for token, rank in np.argwhere(keep.numpy()):
        expert = int(ids[token, rank])
        output[token] += scale[token, rank] * experts(expert, given.hidden[token].astype(float))
    return output


def executed(probs: NDArray[np.float32]) -> int:
    return int((probs > artifact.DROPPED / 2).sum())


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("weights", ["keep", "renorm"])
@pytest.mark.parametrize("redistribution", ["none", "batch", "sequence"])
@pytest.mark.parametrize("k", range(1, CANDIDATES + 1))
def test_output_and_executed_experts_are_the_plans(
    session: Session, k: int, redistribution: Redistribution, weights: Weights, pairs: bool
) -> None:
    experts = random_experts()
    loaded = session(lowered(experts, k, redistribution, weights, pairs=pairs))
    for name, given in CALLS.items():
        output, probs = loaded.run(None, given.inputs())
        real = given.real.reshape(-1)
        np.testing.assert_allclose(
            output[real],
            reference(experts, given, k, redistribution, weights)[real],
            rtol=RTOL,
            atol=ATOL,
            err_msg=name,
        )
        assert not output[~real].any(), name
        # A padding token runs one expert in the masked lowering, with a weight of zero.
        assert executed(probs) == k * real.sum() + (0 if pairs else (~real).sum()), name


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_biases_are_lowered(session: Session, pairs: bool) -> None:
    experts = random_experts(biased=True)
    loaded = session(lowered(experts, 2, "batch", "keep", pairs=pairs))
    given = CALLS["left-padded batch"]
    output, _ = loaded.run(None, given.inputs())
    expected = reference(experts, given, 2, "batch", "keep")
    np.testing.assert_allclose(output, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("redistribution", ["none", "batch", "sequence"])
def test_a_call_of_padding_alone_runs(session: Session, redistribution: str, pairs: bool) -> None:
    loaded = session(lowered(random_experts(), 2, redistribution, "keep", pairs=pairs))
    output, probs = loaded.run(None, call(np.zeros((2, 3), bool)).inputs())
    assert not output.any()
    assert executed(probs) == (0 if pairs else 6)


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_candidates_of_weight_zero_count_as_executed(session: Session, pairs: bool) -> None:
    # Group-limited routers pad their candidates with experts of weight zero.
    given = CALLS["prompt"]
    weights = given.weights.copy()
    weights[:, 1:] = 0
    zeroed = Call(given.real, 0, given.hidden, given.ids, weights)
    experts = random_experts()
    loaded = session(lowered(experts, 3, "batch", "keep", pairs=pairs))
    output, probs = loaded.run(None, zeroed.inputs())
    expected = reference(experts, zeroed, 3, "batch", "keep")
    np.testing.assert_allclose(output, expected, rtol=RTOL, atol=ATOL)
    assert executed(probs) == 3 * 9


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_half_precision_runs_on_the_cpu(session: Session, pairs: bool) -> None:
    experts = random_experts()
    model = lowered(experts, 2, "batch", "keep", pairs=pairs, dtype=ir.DataType.FLOAT16)
    given = CALLS["left-padded batch"]
    half = ("hidden", "expert_weights")
    inputs = {n: v.astype(np.float16) if n in half else v for n, v in given.inputs().items()}
    rounded = Call(
        given.real,
        0,
        inputs["hidden"].astype(np.float32),
        given.ids,
        inputs["expert_weights"].astype(np.float32),
    )
    output, probs = session(model).run(None, inputs)
    assert output.dtype == np.float16
    expected = reference(experts, rounded, 2, "batch", "keep")
    np.testing.assert_allclose(output, expected, rtol=2e-2, atol=5e-3)
    assert executed(probs) == 2 * 12 + (0 if pairs else 6)


@pytest.mark.parametrize("field", ["gate_up", "down"])
def test_one_wrong_weight_is_noticed(session: Session, field: str) -> None:
    experts = random_experts()
    given = CALLS["prompt"]
    expected = reference(experts, given, 2, "batch", "keep")
    used = int(given.ids[0, 0])
    getattr(experts, field)[used, 0, 0] += 1e-3
    output, _ = session(lowered(experts, 2, "batch", "keep", pairs=False)).run(None, given.inputs())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(output, expected, rtol=RTOL, atol=ATOL)


def test_a_graph_without_a_mask_takes_every_token_as_real(session: Session) -> None:
    experts = random_experts()
    model = layer(experts)
    del model.graph.inputs[1]
    LowerExpertsPass(Allocation([2], "batch"), pairs=False)(model)
    given = CALLS["prompt"]
    inputs = {n: v for n, v in given.inputs().items() if n != "attention_mask"}
    (output,) = session(model).run(None, inputs)
    expected = reference(experts, given, 2, "batch", "keep")
    np.testing.assert_allclose(output, expected, rtol=RTOL, atol=ATOL)


def test_operators_are_those_of_the_lowering() -> None:
    def operators(*, pairs: bool) -> list[str]:
        model = lowered(random_experts(), 2, "batch", "keep", pairs=pairs)
        return [node.op_type for node in model.graph]

    common = ["real_tokens", "rank_candidates"]
    assert operators(pairs=False) == [
        *common,
        "keep_pooled",
        "mask_lowering",
        "MoE",
        "CastLike",
        "Mul",
        "Identity",
    ]
    assert operators(pairs=True) == [
        *common,
        "keep_pooled_static",
        "route_rows",
        "Gather",
        "MoE",
        "combine_rows",
        "Identity",
    ]


@pytest.mark.parametrize("k", [1, CANDIDATES])
def test_nothing_is_pooled_where_nothing_is_shared(k: int) -> None:
    model = lowered(random_experts(), k, "batch", "keep", pairs=False)
    assert "keep_pooled" not in {node.op_type for node in model.graph}
    assert {identifier[1] for identifier in model.functions} == {
        "real_tokens",
        "rank_candidates",
        "keep_all",
        "mask_lowering",
    }


def test_a_second_run_changes_nothing() -> None:
    model = lowered(random_experts(), 2, "batch", "keep", pairs=False)
    names = [node.name for node in model.graph]
    assert not LowerExpertsPass(Allocation([3], "none"), pairs=True)(model).modified
    assert [node.name for node in model.graph] == names


def test_experts_that_are_left_are_reported() -> None:
    with pytest.raises(ir.passes.PostconditionError, match=r"RoutedExperts nodes are left: \['exp"):
        LowerExpertsPass(Allocation([2], "batch"), pairs=False).ensures(layer(random_experts()))


def test_passes_and_runtime_agree_on_the_counted_value_and_the_price() -> None:
    # passes may not import runtime, so each has its own copy.
    assert lower_experts.PRICE_INPUT == artifact.PRICE_INPUT
    assert lower_experts.ROUTER_PROBS == artifact.ROUTER_PROBS
    assert lower_experts.DROPPED == artifact.DROPPED
