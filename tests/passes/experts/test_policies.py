"""The policies as ONNX functions, against what they mean in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alloc_moe.compiler.records import Redistribution
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.passes.base import DOMAIN, add_function
from alloc_moe.passes.experts import routing
from alloc_moe.passes.experts.policies import POLICIES

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
Policy = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.bool_]]

REDISTRIBUTIONS: list[Redistribution] = ["none", "batch", "sequence"]


@pytest.fixture(scope="session")
def policy(session: Session) -> Callable[[str, int, int], Policy]:
    """Return a function from (redistribution, k, K) to its policy: (weights, real) -> keep mask."""

    @functools.cache
    def load(redistribution: str, k: int, candidates: int) -> Policy:
        entry = POLICIES[redistribution]
        inputs = [
            ir.val("weights", ir.DataType.FLOAT, ["t", candidates]),
            ir.val("ids", ir.DataType.INT64, ["t", candidates]),
            ir.val("real", ir.DataType.BOOL, ["b", "s"]),
        ]
        node = ir.node(
            entry.function.name, inputs, attributes={"k": k, **entry.attributes}, domain=DOMAIN
        )
        node.outputs[0].name = "keep"
        node.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="policy")
        model = ir.Model(graph, ir_version=10)
        add_function(model, entry.function)
        loaded = session(model)

        def keep(weights: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.bool_]:
            ids = np.zeros(weights.shape, np.int64)
            kept: NDArray[np.bool_]
            (kept,) = loaded.run(None, {"weights": weights, "ids": ids, "real": real})
            return kept

        return keep

    return load


def expected(
    redistribution: Redistribution, weights: NDArray[np.float32], real: NDArray[np.bool_], k: int
) -> NDArray[np.bool_]:
    ids = torch.zeros(weights.shape, dtype=torch.int64)
    tensors = torch.from_numpy(weights), ids, torch.from_numpy(real)
    return keep_mask(redistribution, *tensors, LayerParameters(k)).numpy()


@st.composite
def routings(
    draw: st.DrawFn,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], int]:
    """Draw ranked weights [B * S, K], many of them tied, real tokens [B, S], and 1 < k < K."""
    candidates = draw(st.integers(3, 6))
    k = draw(st.integers(2, candidates - 1))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    levels = draw(st.sampled_from([1, 3, 1000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = random.integers(0, levels, (batch * length, candidates)).astype(np.float32) / levels
    real = random.random((batch, length)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return -np.sort(-weights, axis=1), real, k


@pytest.mark.parametrize("redistribution", ["batch", "sequence"])
@settings(max_examples=150, deadline=None)
@given(routing=routings())
def test_pools_keep_what_the_reference_keeps(
    policy: Callable[[str, int, int], Policy],
    redistribution: Redistribution,
    routing: tuple[NDArray[np.float32], NDArray[np.bool_], int],
) -> None:
    weights, real, k = routing
    kept = policy(redistribution, k, weights.shape[1])(weights, real)
    np.testing.assert_array_equal(kept, expected(redistribution, weights, real, k))
    assert kept.sum() == k * real.sum()


@settings(max_examples=30, deadline=None)
@given(routing=routings())
def test_without_redistribution_the_first_k_are_kept(
    policy: Callable[[str, int, int], Policy],
    routing: tuple[NDArray[np.float32], NDArray[np.bool_], int],
) -> None:
    weights, real, k = routing
    # The lowering hands over only as many candidates as are kept.
    kept = policy("none", k, k)(weights[:, :k], real)
    np.testing.assert_array_equal(kept, expected("none", weights, real, k)[:, :k])


@pytest.mark.parametrize("redistribution", ["batch", "sequence"])
@pytest.mark.parametrize("k", [2, 4, 7])
@pytest.mark.parametrize("levels", [4, 10**6])
def test_long_calls_break_ties_as_the_reference_does(
    policy: Callable[[str, int, int], Policy],
    redistribution: Redistribution,
    k: int,
    levels: int,
    rng: np.random.Generator,
) -> None:
    # onnxruntime's TopK has one algorithm for few winners and another for many.
    weights = rng.integers(0, levels, (3 * 700, 8)).astype(np.float32) / levels
    weights = -np.sort(-weights, axis=1)
    real = np.arange(700)[None] >= np.array([[0], [50], [690]])
    kept = policy(redistribution, k, 8)(weights, real)
    np.testing.assert_array_equal(kept, expected(redistribution, weights, real, k))


@pytest.mark.parametrize("levels", [3, 10**6])
def test_candidates_are_ranked_as_in_the_reference(
    session: Session, levels: int, rng: np.random.Generator
) -> None:
    inputs = [
        ir.val("weights", ir.DataType.FLOAT, ["t", 6]),
        ir.val("ids", ir.DataType.INT64, ["t", 6]),
    ]
    name = routing.rank_candidates.name
    node = ir.node(name, inputs, attributes={"candidates": 4}, domain=DOMAIN, num_outputs=2)
    for value, output, dtype in zip(
        node.outputs, ("best", "experts"), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
    ):
        value.name, value.type = output, ir.TensorType(dtype)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="rank")
    model = ir.Model(graph, ir_version=10)
    add_function(model, routing.rank_candidates)
    weights = rng.integers(0, levels, (50, 6)).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(6), (50, 1)), axis=1)
    best, experts = session(model).run(None, {"weights": weights, "ids": ids})
    ranked = rank_candidates(torch.from_numpy(weights), torch.from_numpy(ids))
    np.testing.assert_array_equal(best, ranked[0][:, :4])
    np.testing.assert_array_equal(experts, ranked[1][:, :4])
