from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.records import Redistribution
from alloc_moe.compiler.reference.policies import (
    POLICIES,
    LayerParameters,
    adjust_weights,
    keep_mask,
    layer_parameters,
    rank_candidates,
)
from alloc_moe.runtime.artifact.plan import AllocationPlan, Budget, PlannedLayer
from alloc_moe.runtime.errors import ArtifactError

REDISTRIBUTIONS: list[Redistribution] = ["none", "batch", "sequence"]


def routing(
    batch: int, length: int, candidates: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch * length, 2 * candidates, generator=generator).softmax(-1)
    weights, ids = scores.topk(candidates)
    return weights, ids


def left_padded(batch: int, length: int) -> torch.Tensor:
    pads = torch.arange(batch)[:, None] * 2 % length
    return torch.arange(length)[None] >= pads


def kept(
    redistribution: Redistribution, weights: torch.Tensor, real: torch.Tensor, k: int
) -> torch.Tensor:
    ids = torch.zeros_like(weights, dtype=torch.long)
    return keep_mask(redistribution, weights, ids, real, LayerParameters(k))


def test_candidates_are_ranked_and_ties_keep_their_order() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.1, 0.2]])
    ranked, ids = rank_candidates(weights, torch.tensor([[7, 3, 5, 1]]))
    assert ranked.tolist() == [pytest.approx([0.4, 0.2, 0.1, 0.1])]
    assert ids.tolist() == [[3, 1, 7, 5]]


@settings(max_examples=60, deadline=None)
@given(
    redistribution=st.sampled_from(REDISTRIBUTIONS),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    candidates=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_exactly_k_per_real_token_run_and_no_pad(
    redistribution: Redistribution,
    batch: int,
    length: int,
    candidates: int,
    seed: int,
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(1, candidates))
    real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights, _ = routing(batch, length, candidates, seed=seed)
    weights = (weights * 20).round()  # plenty of ties
    mask = kept(redistribution, weights, real, k)
    assert int(mask.sum()) == k * int(real.sum())
    assert not mask[~real.flatten()].any()
    assert torch.equal(mask[:, 0], real.flatten())
    if redistribution == "sequence":
        assert torch.equal(mask.view(batch, -1).sum(1), k * real.sum(1))


def test_none_keeps_the_first_k() -> None:
    weights, _ = routing(2, 3, 4)
    mask = kept("none", weights, torch.ones(2, 3, dtype=torch.bool), 2)
    assert mask.tolist() == [[True, True, False, False]] * 6


@pytest.mark.parametrize("redistribution", ["batch", "sequence"])
def test_the_largest_weights_of_a_pool_win(redistribution: Redistribution) -> None:
    weights = torch.tensor([[0.5, 0.40, 0.30], [0.9, 0.05, 0.01], [0.6, 0.20, 0.10]])
    mask = kept(redistribution, weights, torch.ones(1, 3, dtype=torch.bool), 2)
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


def test_pools_differ_between_batch_and_sequence() -> None:
    weights = torch.tensor([[0.5, 0.4, 0.3], [0.9, 0.05, 0.01]])
    real = torch.ones(2, 1, dtype=torch.bool)
    assert kept("batch", weights, real, 2).tolist() == [[True, True, True], [True, False, False]]
    assert kept("sequence", weights, real, 2).tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("redistribution", ["batch", "sequence"])
def test_equal_weights_go_to_the_earlier_token_then_the_better_rank(
    redistribution: Redistribution,
) -> None:
    mask = kept(redistribution, torch.ones(4, 3), torch.ones(1, 4, dtype=torch.bool), 2)
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, False, False], [True, False, False]]


def test_pads_neither_compete_nor_count() -> None:
    weights, _ = routing(3, 8, 4)
    real = left_padded(3, 8)
    padded = kept("batch", weights, real, 2)
    alone = kept(
        "batch", weights[real.flatten()], torch.ones(1, int(real.sum()), dtype=torch.bool), 2
    )
    assert torch.equal(padded[real.flatten()], alone)
    extreme = torch.where(real.reshape(-1, 1), weights, 1e9)
    assert torch.equal(kept("batch", extreme, real, 2), padded)


def test_sequence_does_not_depend_on_batch_mates() -> None:
    weights, _ = routing(4, 6, 4)
    real = left_padded(4, 6)
    mask = kept("sequence", weights, real, 3).view(4, 6, 4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = kept("sequence", weights.view(4, 6, 4)[order].flatten(0, 1), real[order], 3)
    assert torch.equal(shuffled.view(4, 6, 4), mask[order])
    for row in range(4):
        alone = kept("sequence", weights.view(4, 6, 4)[row], real[row : row + 1], 3)
        assert torch.equal(alone, mask[row])


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_single_token_gets_its_top_k(redistribution: Redistribution, k: int) -> None:
    weights, _ = routing(1, 1, 4)
    mask = kept(redistribution, weights, torch.ones(1, 1, dtype=torch.bool), k)
    assert mask.tolist() == [[rank < k for rank in range(4)]]


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_margin_is_that_of_the_closest_decision(redistribution: Redistribution) -> None:
    weights = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.3, 0.2]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    real = torch.ones(1, 2, dtype=torch.bool)
    policy = POLICIES[redistribution]
    expected = {"none": 0.1, "batch": 0.1, "sequence": 0.1}[redistribution]
    assert policy(weights, ids, real, LayerParameters(2)).margin == pytest.approx(expected)
    assert policy(weights, ids, real, LayerParameters(3)).margin == math.inf
    assert policy(weights, ids, real, LayerParameters(1)).margin == pytest.approx(0.4)
    assert policy(weights, ids, ~real, LayerParameters(2)).margin == math.inf


@pytest.mark.parametrize(
    ("redistribution", "expected"),
    [
        ("none", [[math.inf, 0.4, 0.4], [math.inf, 0.1, 0.1]]),
        ("batch", [[math.inf, 0.3, 0.2], [math.inf, 0.1, 0.1]]),
        ("sequence", [[math.inf, 0.4, 0.4], [math.inf, 0.1, 0.1]]),
    ],
)
def test_each_decision_has_its_gap(
    redistribution: Redistribution, expected: list[list[float]]
) -> None:
    weights = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.3, 0.2]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    rows = 2 if redistribution == "sequence" else 1
    real = torch.ones(rows, 2 // rows, dtype=torch.bool)
    kept = POLICIES[redistribution](weights, ids, real, LayerParameters(2))
    torch.testing.assert_close(kept.gaps, torch.tensor(expected))


def test_margin_counts_a_close_first_rank() -> None:
    weights = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.49, 0.1]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    real = torch.ones(1, 2, dtype=torch.bool)
    assert POLICIES["batch"](weights, ids, real, LayerParameters(2)).margin == pytest.approx(0.01)


def test_weights_are_kept_or_scaled_to_the_sum_of_all() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.1, 0.1, 0.1]])
    keep = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    torch.testing.assert_close(adjust_weights("keep", weights, keep), weights * keep)
    expected = torch.tensor([[0.625, 0.375, 0.0], [0.6, 0.2, 0.2], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(adjust_weights("renorm", weights, keep), expected)


def planned(redistribution: str, **more: Any) -> AllocationPlan:
    layers = (
        PlannedLayer("a", 2, 2, 1.5, threshold=0.25, sizes=(1.0, 2.0)),
        PlannedLayer("b", 2, 2, 1.0, threshold=0.5, sizes=(3.0, 4.0)),
    )
    return AllocationPlan("m", Budget(0.6, 2.5, 4), redistribution, "keep", layers, **more)


def test_a_plan_gives_each_layer_its_parameters() -> None:
    first, second = layer_parameters(planned("threshold", cap=1.5))
    assert (first.threshold, second.threshold) == (0.25, 0.5)
    assert (first.k, first.cap) == (1.5, 1.5)
    priced = planned("price", price=0.1)
    assert [given.threshold for given in layer_parameters(priced)] == [0.1, 0.1]
    assert [given.threshold for given in layer_parameters(priced, 0.0)] == [0.0, 0.0]
    assert layer_parameters(priced)[1].sizes == (3.0, 4.0)
    whole = tuple(dataclasses.replace(layer, k=2) for layer in priced.layers)
    counted = dataclasses.replace(planned("none"), layers=whole)
    assert layer_parameters(counted) == [LayerParameters(2), LayerParameters(2)]


def test_a_plan_that_lacks_something_is_reported() -> None:
    plan = planned("price", price=0.1)
    bare = dataclasses.replace(
        plan, layers=tuple(PlannedLayer(layer.name, 2, 2, 1.0) for layer in plan.layers)
    )
    with pytest.raises(ArtifactError, match="by price but lacks it"):
        layer_parameters(planned("price"))
    with pytest.raises(ArtifactError, match="by price but lacks the 'sizes' of a"):
        layer_parameters(bare)
    with pytest.raises(ArtifactError, match=r"by none, which needs whole .* but gives a 1\.5\."):
        layer_parameters(planned("none"))
    with pytest.raises(ArtifactError, match="by ratio but lacks the 'threshold' of a"):
        layer_parameters(dataclasses.replace(bare, redistribution="ratio"))
