"""Scores and what they keep, in the graph and in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alloc_moe.compiler.records import SCORED, Redistribution
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.passes.base import DOMAIN, add_function
from alloc_moe.passes.experts.policies import SCORES
from alloc_moe.passes.experts.policies.scored import cap_call, keep_scored

Session = Callable[[ir.Model], onnxruntime.InferenceSession]
Array = NDArray[Any]

EXPERTS, HIDDEN, INTERMEDIATE = 8, 4, 3


SIZES = np.linspace(0.5, 2, EXPERTS, dtype=np.float32)


@pytest.fixture(scope="session")
def keep(session: Session) -> Callable[..., Array]:
    """Return a function from weights, ids, real tokens, threshold and quota to the keep mask."""

    @functools.cache
    def load(redistribution: str, capped: bool, candidates: int) -> onnxruntime.InferenceSession:
        inputs = [
            ir.val("weights", ir.DataType.FLOAT, ["t", "k"]),
            ir.val("ids", ir.DataType.INT64, ["t", "k"]),
            ir.val("sizes", ir.DataType.FLOAT, [EXPERTS]),
            ir.val("real", ir.DataType.BOOL, ["b", "s"]),
            ir.val("threshold", ir.DataType.FLOAT, []),
            ir.val("quota", ir.DataType.DOUBLE, []),
        ]
        score = SCORES[redistribution]
        scored = ir.node(score.name, inputs[:3], domain=DOMAIN)
        kept = ir.node(
            keep_scored.name,
            [scored.outputs[0], inputs[3], inputs[4]],
            attributes={"others": [candidates - 1]},
            domain=DOMAIN,
        )
        last = ir.node(
            cap_call.name,
            [scored.outputs[0], kept.outputs[0], inputs[3], inputs[5]],
            domain=DOMAIN,
        )
        nodes = [scored, kept, last] if capped else [scored, kept]
        output = nodes[-1].outputs[0]
        output.name, output.type = "keep", ir.TensorType(ir.DataType.BOOL)
        graph = ir.Graph(inputs, [output], nodes=nodes, opset_imports={"": 23}, name="scored")
        model = ir.Model(graph, ir_version=10)
        for function in (score, keep_scored, cap_call)[: len(nodes)]:
            add_function(model, function)
        return session(model)

    def run(
        redistribution: str, weights: Array, ids: Array, real: Array, threshold: float, quota: float
    ) -> Array:
        capped = np.isfinite(quota)
        feeds = {"weights": weights, "ids": ids, "sizes": SIZES, "real": real}
        feeds |= {
            "threshold": np.array(threshold, np.float32),
            "quota": np.array(quota, np.float64),
        }
        kept: Array
        (kept,) = load(redistribution, bool(capped), weights.shape[1]).run(None, feeds)
        return kept

    return run


@st.composite
def routings(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Draw ranked weights and ids [B * S, K], many weights tied, and real tokens [B, S]."""
    candidates = draw(st.integers(2, 6))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    levels = draw(st.sampled_from([1, 3, 1000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = random.integers(0, levels, (batch * length, candidates)).astype(np.float32) / levels
    ids = random.permuted(np.tile(np.arange(EXPERTS), (batch * length, 1)), axis=1)
    real = random.random((batch, length)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return -np.sort(-weights, axis=1), ids[:, :candidates], real


@pytest.mark.parametrize("redistribution", SCORED)
@settings(max_examples=100, deadline=None)
@given(
    routing=routings(),
    threshold=st.floats(0, 1),
    k=st.floats(1, 4),
    cap=st.floats(1, 3) | st.none(),
)
def test_the_graph_keeps_what_the_reference_keeps(
    keep: Callable[..., Array],
    redistribution: Redistribution,
    routing: tuple[Array, Array, Array],
    threshold: float,
    k: float,
    cap: float | None,
) -> None:
    weights, ids, real = routing
    threshold = -threshold * 3 if redistribution == "top-p" else threshold
    given = LayerParameters(k, threshold, tuple(SIZES.tolist()), cap)
    tensors = torch.from_numpy(weights), torch.from_numpy(ids), torch.from_numpy(real)
    expected = keep_mask(redistribution, *tensors, given).numpy()
    quota = given.quota(weights.shape[1])
    actual = keep(redistribution, weights, ids, real, threshold, quota)
    np.testing.assert_array_equal(actual, expected)
    assert cap is None or actual[:, 1:].sum() <= quota * real.sum()


@pytest.mark.parametrize("redistribution", SCORED)
def test_random_weights_are_scored_bit_for_bit(
    keep: Callable[..., Array], redistribution: Redistribution, rng: np.random.Generator
) -> None:
    weights = -np.sort(-rng.random((500, 8), np.float32), axis=1)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (500, 1)), axis=1)
    real = np.ones((1, 500), bool)
    tensors = torch.from_numpy(weights), torch.from_numpy(ids)
    exact = scores(redistribution, *tensors, SIZES.tolist()).numpy()
    # A threshold that is a score itself decides by its last bit.
    for threshold in exact[:40, 5]:
        kept = keep(redistribution, weights, ids, real, threshold, np.inf)
        np.testing.assert_array_equal(kept[:, 1:], exact[:, 1:] >= threshold)
