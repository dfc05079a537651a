"""Decisions by score and threshold in the graph, against what they mean in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.records import SCORED, Redistribution, Weights
from alloc_moe.compiler.reference.policies import (
    LayerParameters,
    adjust_weights,
    keep_mask,
    rank_candidates,
)
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.compiler.reference.token_sizes import for_tokens
from alloc_moe.passes.base import DOMAIN, ROUTED_EXPERTS, add_initializer
from alloc_moe.passes.default import specialize_passes
from alloc_moe.passes.experts.lower import PRICE_INPUT, Allocation, TokenFactors
from alloc_moe.passes.experts.policies.scored import cap_call, keep_scored
from alloc_moe.runtime.artifact.plan import DROPPED, ROUTER_PROBS
from alloc_moe.runtime.artifact.token_sizes import LIMIT, TokenSizes

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
Array = NDArray[Any]

EXPERTS, HIDDEN, INTERMEDIATE = 8, 4, 3
SIZES = np.linspace(0.5, 2, EXPERTS, dtype=np.float32)


def layer(candidates: int, dtype: ir.DataType, layers: int = 2) -> ir.Model:
    """Return a graph of RoutedExperts nodes, one after the other, all routed alike."""
    random = np.random.default_rng(7)
    inputs = [
        ir.val("input_ids", ir.DataType.INT64, ["b", "s"]),
        ir.val("attention_mask", ir.DataType.INT64, ["b", "total"]),
        ir.val("hidden", dtype, ["t", HIDDEN]),
        ir.val("expert_ids", ir.DataType.INT64, ["t", candidates]),
        ir.val("expert_weights", dtype, ["t", candidates]),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="layers")
    model = ir.Model(graph, ir_version=10)

    def weight(name: str, *shape: int) -> ir.Value:
        array = random.normal(scale=0.4, size=shape).astype(dtype.numpy())
        return add_initializer(model, ir.tensor(array, dtype, name=name))

    hidden = inputs[2]
    for index in range(layers):
        gate_up = weight(f"gate_up.{index}", EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        down = weight(f"down.{index}", EXPERTS, HIDDEN, INTERMEDIATE)
        node = ir.node(
            ROUTED_EXPERTS,
            [hidden, inputs[3], inputs[4], gate_up, None, down, None],
            attributes={"layer": index, "transposed": 0, "interleaved": 1},
            domain=DOMAIN,
            name=f"experts.{index}",
        )
        graph.append(node)
        hidden = node.outputs[0]
    user = ir.node("Identity", [hidden])
    user.outputs[0].name = "y"
    user.outputs[0].type, user.outputs[0].shape = ir.TensorType(dtype), ir.Shape(["t", HIDDEN])
    graph.append(user)
    graph.outputs.append(user.outputs[0])
    return model


def lowered(
    allocation: Allocation, *, pairs: bool, candidates: int = 4, half: bool = False
) -> ir.Model:
    """Return the lowered layers, their router probabilities further outputs."""
    dtype = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    model = layer(candidates, dtype, len(allocation.experts_per_token))
    specialize_passes(allocation, pairs=pairs)(model)
    for index in range(len(allocation.experts_per_token)):
        name = ROUTER_PROBS.format(layer=index)
        [probs] = [v for n in model.graph for v in n.outputs if v.name == name]
        probs.type, probs.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", EXPERTS])
        model.graph.outputs.append(probs)
    return model


def scored(redistribution: str, thresholds: list[float], **more: Any) -> Allocation:
    count = len(thresholds)
    sizes = [SIZES.tolist()] * count if redistribution == "price" else [None] * count
    return Allocation([2.0] * count, redistribution, thresholds=thresholds, sizes=sizes, **more)


def token_sizes(index: int) -> TokenSizes:
    """Return what tokens multiply a layer's sizes by: some beyond what is allowed."""
    random = np.random.default_rng(index)
    return TokenSizes.of(random.normal(size=(HIDDEN, EXPERTS)), random.normal(size=EXPERTS))


def token_factors(index: int) -> TokenFactors:
    return TokenFactors(*token_sizes(index).arrays, LIMIT)


def feeds(real: Array, candidates: int = 4, dtype: type = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(real.size)
    logits = random.random((real.size, EXPERTS)).astype(np.float32)
    ids = random.permuted(np.argsort(-logits, axis=1)[:, :candidates], axis=1)  # unsorted
    return {
        "input_ids": np.zeros(real.shape, np.int64),
        "attention_mask": real.astype(np.int64),
        "hidden": random.normal(size=(real.size, HIDDEN)).astype(dtype),
        "expert_ids": ids,
        "expert_weights": np.take_along_axis(logits, ids, axis=1).astype(dtype) / dtype(4),
    }


REAL = np.arange(6)[None] >= np.array([[0], [4], [2]])
THRESHOLDS: dict[Redistribution, list[float]] = {
    "threshold": [0.2, 0.15],
    "price": [0.2, 0.2],
    "top-p": [-0.3, -0.5],
    "ratio": [0.8, 0.7],
}


def output_of(
    model: ir.Model, inputs: dict[str, Array], allocation: Allocation, weights: Weights
) -> tuple[Array, list[int]]:
    """Return what the layers give by a loop over experts, and how many they execute."""
    ranked, ids = rank_candidates(
        torch.from_numpy(inputs["expert_weights"].astype(np.float32)),
        torch.from_numpy(inputs["expert_ids"]),
    )
    hidden = inputs["hidden"].astype(np.float64)
    executed = []
    for index, threshold in enumerate(allocation.thresholds):
        real = torch.from_numpy(inputs["attention_mask"] > 0)
        given = LayerParameters(
            2.0, threshold, tuple(SIZES.tolist()), allocation.cap, allocation.overlap
        )
        if allocation.token_factors:
            given = dataclasses.replace(given, token_sizes=token_sizes(index))
            given = for_tokens(given, torch.from_numpy(hidden.astype(np.float32)))
        kept = keep_mask(allocation.redistribution, ranked, ids, real, given)  # type: ignore[arg-type]
        scale = adjust_weights(weights, ranked, kept).numpy().astype(np.float64)
        gate_up, down = (
            model.graph.initializers[f"{name}.{index}"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
            for name in ("gate_up", "down")
        )
        output = np.zeros_like(hidden)
        for token, rank in np.argwhere(kept.numpy()):
            expert = int(ids[token, rank])
            rows = gate_up[expert] @ hidden[token]
            gated = rows[0::2] / (1 + np.exp(-rows[0::2])) * rows[1::2]
            output[token] += scale[token, rank] * (down[expert] @ gated)
        executed.append(int(kept.sum()))
        hidden = output
    return hidden, executed


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("weights", ["keep", "renorm"])
@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("redistribution", SCORED)
def test_output_and_executed_experts_are_those_of_the_reference(
    session: Session,
    redistribution: Redistribution,
    cap: float | None,
    weights: Weights,
    pairs: bool,
    half: bool,
) -> None:
    allocation = scored(redistribution, THRESHOLDS[redistribution], weights=weights, cap=cap)
    model = lowered(allocation, pairs=pairs, half=half)
    loaded = session(model)
    for real in (REAL, np.ones((1, 1), bool), np.zeros((2, 2), bool)):
        inputs = feeds(real, dtype=np.float16 if half else np.float32)
        output, *probs = loaded.run(None, inputs)
        expected, executed = output_of(model, inputs, allocation, weights)
        tolerance = {"rtol": 2e-2, "atol": 5e-3} if half else {"rtol": 1e-5, "atol": 2e-6}
        np.testing.assert_allclose(output, expected, **tolerance)
        pads = 0 if pairs else int((~real).sum())
        assert [(prob > DROPPED / 2).sum() - pads for prob in probs] == executed
        if cap is not None:
            assert max(executed) <= 2 * real.sum()


def assert_computes(
    session: Session,
    model: ir.Model,
    inputs: dict[str, np.ndarray],
    allocation: Allocation,
    *,
    pairs: bool,
    half: bool,
) -> list[int]:
    """Compare a lowered graph with the reference, and return how many experts ran by layer."""
    output, *probs = session(model).run(None, inputs)
    expected, executed = output_of(model, inputs, allocation, "keep")
    tolerance = {"rtol": 2e-2, "atol": 5e-3} if half else {"rtol": 1e-5, "atol": 2e-6}
    np.testing.assert_allclose(output, expected, **tolerance)
    pads = 0 if pairs else int((~REAL).sum())
    assert [(prob > DROPPED / 2).sum() - pads for prob in probs] == executed
    return executed


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("cap", [None, 1.0])
def test_overlapping_experts_are_scored_as_in_the_reference(
    session: Session, cap: float | None, pairs: bool, half: bool
) -> None:
    inputs = feeds(REAL, dtype=np.float16 if half else np.float32)
    ranked, ids = rank_candidates(
        torch.from_numpy(inputs["expert_weights"].astype(np.float32)),
        torch.from_numpy(inputs["expert_ids"]),
    )
    exact = scores("price", ranked, ids, SIZES.tolist(), 0.7)
    # A price that is a score itself decides by its last bit.
    for price in exact[6:10, 2].tolist():
        allocation = scored("price", [price, price], cap=cap, overlap=0.7)
        model = lowered(allocation, pairs=pairs, half=half)
        assert_computes(session, model, inputs, allocation, pairs=pairs, half=half)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("cap", [None, 1.0])
def test_tokens_have_the_sizes_that_they_have_in_the_reference(
    session: Session, cap: float | None, overlap: float, pairs: bool, half: bool
) -> None:
    inputs = feeds(REAL, dtype=np.float16 if half else np.float32)
    factors = [token_factors(0), token_factors(1)]
    plain = scored("price", [0.3, 0.3], cap=cap, overlap=overlap)
    allocation = dataclasses.replace(plain, token_factors=factors)
    model = lowered(allocation, pairs=pairs, half=half)
    onnx.checker.check_model(ir.to_proto(model))
    executed = assert_computes(session, model, inputs, allocation, pairs=pairs, half=half)
    _, otherwise = output_of(model, inputs, plain, "keep")
    assert executed != otherwise or cap is not None


def test_a_graph_without_token_sizes_has_no_trace_of_them() -> None:
    allocation = scored("price", [0.3])
    none = dataclasses.replace(allocation, token_factors=[None])
    plain, other = (ir.to_proto(lowered(given, pairs=False)) for given in (allocation, none))
    assert plain.SerializeToString() == other.SerializeToString()
    assert b"scale_by_token" not in plain.SerializeToString()


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_a_price_of_zero_runs_every_candidate(session: Session, pairs: bool) -> None:
    inputs = feeds(REAL)
    full = session(lowered(Allocation([4, 4], "none"), pairs=pairs)).run(None, inputs)
    for overlap in (0.0, 0.5):
        allocation = scored("price", [0.0, 0.0], overlap=overlap)
        free = session(lowered(allocation, pairs=pairs)).run(None, inputs)
        if not pairs:
            for actual, expected in zip(free, full, strict=True):
                np.testing.assert_array_equal(actual, expected)
            continue
        # The operator's own k in the one, a row for each pair in the other: rounded differently.
        np.testing.assert_allclose(free[0], full[0], rtol=1e-5, atol=2e-6)
        for probs in (*free[1:], *full[1:]):
            assert (probs > DROPPED / 2).sum() == 4 * REAL.sum()


def test_a_dial_per_sequence_equals_graphs_of_every_price(session: Session) -> None:
    dial = lowered(scored("price", [0.2, 0.2], dial=True, price_per_sequence=True), pairs=False)
    onnx.checker.check_model(ir.to_proto(dial))
    loaded = session(dial)
    (overridable,) = loaded.get_overridable_initializers()
    assert (overridable.name, overridable.shape) == (PRICE_INPUT, ["prices"])
    inputs = feeds(REAL)
    prices = [0.35, 0.0, 0.1]
    whole = {
        price: session(lowered(scored("price", [price, price]), pairs=False)).run(None, inputs)
        for price in (*prices, 0.2)
    }
    for expected, actual in zip(whole[0.2], loaded.run(None, inputs), strict=True):
        np.testing.assert_array_equal(actual, expected)
    for given in (prices, [0.1]):
        found = loaded.run(None, {**inputs, PRICE_INPUT: np.array(given, np.float32)})
        for row, price in enumerate(given * (3 // len(given))):
            tokens = slice(6 * row, 6 * row + 6)
            output, *probs = whole[price]
            # The operator adds up in an order that depends on what other tokens run.
            np.testing.assert_allclose(found[0][tokens], output[tokens], rtol=1e-6)
            for expected, actual in zip(probs, found[1:], strict=True):
                np.testing.assert_array_equal(actual[tokens], expected[tokens])


@pytest.mark.parametrize("pairs", [False, True], ids=["mask", "pairs"])
def test_one_graph_with_a_dial_equals_graphs_of_every_price(session: Session, pairs: bool) -> None:
    inputs = feeds(REAL)
    dial = lowered(scored("price", [0.2, 0.2], dial=True), pairs=pairs)
    onnx.checker.check_model(ir.to_proto(lowered(scored("price", [0.2], dial=True), pairs=pairs)))
    loaded = session(dial)
    assert PRICE_INPUT not in {value.name for value in loaded.get_inputs()}
    (overridable,) = loaded.get_overridable_initializers()
    assert (overridable.name, overridable.type, overridable.shape) == (
        PRICE_INPUT,
        "tensor(float)",
        [],
    )
    counts = set()
    for price in (0.0, 0.1, 0.2, 0.35, 1e9):
        fixed = session(lowered(scored("price", [price, price]), pairs=pairs))
        assert not fixed.get_overridable_initializers()
        expected = fixed.run(None, inputs)
        actual = loaded.run(None, {**inputs, PRICE_INPUT: np.array(price, np.float32)})
        for mine, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(mine, other)
        counts.add((expected[1] > DROPPED / 2).sum())
        if price == 0.2:
            np.testing.assert_array_equal(loaded.run(None, inputs)[0], expected[0])
    assert len(counts) == 5


def test_a_cap_that_leaves_room_for_all_is_left_out() -> None:
    model = lowered(scored("threshold", [0.2], cap=2.0), pairs=False)
    assert cap_call.name not in {node.op_type for node in model.graph}
    model = lowered(scored("threshold", [0.2], cap=1.9), pairs=False)
    assert cap_call.name in {node.op_type for node in model.graph}


def test_a_router_with_one_candidate_has_nothing_to_decide(session: Session) -> None:
    model = lowered(Allocation([1.0], "threshold", thresholds=[0.5]), pairs=False, candidates=1)
    assert keep_scored.name not in {node.op_type for node in model.graph}
    _, probs = session(model).run(None, feeds(REAL, candidates=1))
    assert (probs > DROPPED / 2).sum() == REAL.size
