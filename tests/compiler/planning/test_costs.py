from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.errors import CostError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning import latency
from alloc_moe.compiler.planning.costs import CostTable, measure_costs
from alloc_moe.compiler.planning.shapes import ExpertShape, distinct_experts, expert_shapes

SMALL = ExpertShape(experts=8, experts_per_token=2, hidden=16, intermediate=12)
LARGE = ExpertShape(experts=4, experts_per_token=3, hidden=16, intermediate=100, biased=True)


def test_activations_cost_one_each() -> None:
    table = measure_costs("activations", [SMALL, LARGE], dtype="float32")
    assert table.prices == ((1, 2), (1, 2, 3))
    assert (table.unit, table.original) == ("activations per token", 5)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_are_those_of_the_weights_one_token_reads(dtype: str, size: int) -> None:
    table = measure_costs("bytes", [SMALL, LARGE], dtype=dtype)
    small = 3 * 16 * 12 * size
    large = (3 * 16 * 100 + 2 * 100 + 16) * size
    assert table.prices == ((small, 2 * small), (large, 2 * large, 3 * large))
    assert table.original == 2 * small + 3 * large


def test_tokens_of_a_batch_share_experts() -> None:
    alone = measure_costs("bytes", [SMALL], dtype="float32").prices[0]
    shared = measure_costs("bytes", [SMALL], dtype="float32", batch=3).prices[0]
    # Of 8 experts, 3 tokens of 1 each run 8 * (1 - (7/8)^3), of 2 each 8 * (1 - (6/8)^3).
    assert shared == (alone[0] * 8 * (1 - (7 / 8) ** 3), alone[0] * 8 * (1 - (6 / 8) ** 3))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_distinct_experts_are_the_mean_over_all_routings(experts: int, k: int, batch: int) -> None:
    k = min(k, experts)
    of_token = list(itertools.combinations(range(experts), k))
    routings = list(itertools.product(of_token, repeat=batch))
    found = sum(len(set().union(*routing)) for routing in routings)
    assert distinct_experts(experts, k, batch) == Fraction(found, len(routings))


def test_bytes_of_an_unknown_type_are_refused() -> None:
    with pytest.raises(CostError, match=r"bytes of float8 weights .* float32, float16, bfloat16"):
        measure_costs("bytes", [SMALL], dtype="float8")


def test_latencies_are_those_of_each_layers_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {SMALL: (1.0, 2.0), LARGE: (5.0, 4.0, 9.0)}
    monkeypatch.setattr(latency, "measure_latencies", lambda *_, **__: times)
    table = measure_costs("latency", [LARGE, SMALL, LARGE], dtype="float32")
    assert table.prices == (times[LARGE], times[SMALL], times[LARGE])
    assert (table.kind, table.unit, float(table.original)) == ("latency", "ms", 20.0)


def test_a_plans_cost_is_summed_exactly() -> None:
    table = CostTable("latency", "ms", 1, "float32", ((0.1, 0.25), (0.2, 0.5)))
    assert table.total([1, 1]) == Fraction(0.1) + Fraction(0.2)
    assert table.cheapest == table.total([1, 1])
    assert table.to_plan([1, 2], Fraction(1, 2)) == {
        "kind": "latency",
        "unit": "ms",
        "batch": 1,
        "dtype": "float32",
        "limit": 0.5,
        "planned": 0.6,
        "original": 0.75,
    }


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_shapes_hold_all_weights_of_the_experts(
    moe_model: Callable[[str], MoeModel], family: str
) -> None:
    moe = moe_model(family)
    for shape, layer in zip(expert_shapes(moe.checkpoint), moe.layers, strict=True):
        module = moe.model.get_submodule(layer.experts_name)
        assert shape.parameters * shape.experts == sum(p.numel() for p in module.parameters())
        assert shape.experts_per_token == layer.experts_per_token


def test_the_file_of_latencies_lies_beside_the_profile() -> None:
    assert latency.latency_path(Path("a/out.onnx.profile.json")) == Path("a/out.onnx.latency.json")
    assert latency.latency_path(Path("p.json")) == Path("p.latency.json")
