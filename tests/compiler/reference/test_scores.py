from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.records import SCORED, Redistribution
from alloc_moe.compiler.reference.policies import POLICIES, LayerParameters, keep_mask
from alloc_moe.compiler.reference.scores import scores

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


def scored(
    redistribution: Redistribution, weights: torch.Tensor, ids: torch.Tensor, **parameters: Any
) -> torch.Tensor:
    real = torch.ones(1, len(weights), dtype=torch.bool)
    return keep_mask(redistribution, weights, ids, real, LayerParameters(2.0, **parameters))


WEIGHTS = torch.tensor([[0.5, 0.25, 0.125], [0.75, 0.125, 0.0625]])
IDS = torch.tensor([[0, 1, 2], [2, 0, 1]])


def test_scores_are_what_each_policy_compares() -> None:
    assert scores("threshold", WEIGHTS, IDS).tolist() == WEIGHTS.tolist()
    assert scores("ratio", WEIGHTS, IDS)[0].tolist() == [1, 0.5, 0.25]
    assert scores("top-p", WEIGHTS, IDS).tolist() == [[0, -0.5, -0.75], [0, -0.75, -0.875]]
    priced = scores("price", WEIGHTS, IDS, (1.0, 2.0, 4.0))
    assert priced.tolist() == [[0.5, 0.5, 0.5], [3.0, 0.125, 0.125]]
    assert scores("ratio", torch.zeros(1, 3), IDS[:1]).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="'batch' compares no scores; price, threshold"):
        scores("batch", WEIGHTS, IDS)


def test_overlap_counts_what_is_ranked_behind() -> None:
    sizes = torch.tensor([1.0, 2.0, 4.0])
    for overlap in (0.25, 1.0):
        found = scores("price", WEIGHTS, IDS, sizes, overlap)
        for token in range(2):
            added = [float(sizes[e] * w) for e, w in zip(IDS[token], WEIGHTS[token], strict=True)]
            for rank, one in enumerate(added):
                # |d|^2 with this expert dropped too, less that without: a cosine of `overlap`.
                expected = one**2 + 2 * overlap * one * sum(added[rank + 1 :])
                assert float(found[token, rank]) ** 2 == pytest.approx(expected)
    assert torch.equal(
        scores("price", WEIGHTS, IDS, sizes, 0.0), scores("price", WEIGHTS, IDS, sizes)
    )


def test_margin_holds_for_overlapping_experts() -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(40, 4, generator=random).sort(1, descending=True).values + 0.1
    ids = torch.stack([torch.randperm(4, generator=random) for _ in range(40)])
    given = LayerParameters(2.0, 0.4, (0.5, 1.0, 1.5, 2.0), overlap=0.6)
    real = torch.ones(1, 40, dtype=torch.bool)
    kept = POLICIES["price"](weights, ids, real, given)
    mask, margin = kept.mask, kept.margin
    assert 0 < margin < 0.01
    for _ in range(50):  # changes below the margin, of all weights at once, turn no decision
        noise = (torch.rand(40, 4, generator=random) * 2 - 1) * 0.9 * margin
        assert torch.equal(POLICIES["price"](weights + noise, ids, real, given).mask, mask)


def test_top_p_adds_in_single_precision() -> None:
    weights = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    expected = np.cumsum(weights.numpy(), axis=1, dtype=np.float32)[:, :-1]
    assert np.array_equal(-scores("top-p", weights, weights.long())[:, 1:].numpy(), expected)


@pytest.mark.parametrize(
    ("redistribution", "parameters", "expected"),
    [
        ("threshold", {"threshold": 0.125}, [[1, 1, 1], [1, 1, 0]]),
        ("threshold", {"threshold": 0.9}, [[1, 0, 0], [1, 0, 0]]),
        ("ratio", {"threshold": 0.25}, [[1, 1, 1], [1, 0, 0]]),
        ("top-p", {"threshold": -0.75}, [[1, 1, 1], [1, 1, 0]]),
        ("top-p", {"threshold": -0.6}, [[1, 1, 0], [1, 0, 0]]),
        ("price", {"threshold": 0.5, "sizes": (1.0, 1.0, 4.0)}, [[1, 0, 1], [1, 0, 0]]),
    ],
)
def test_the_first_and_scores_that_reach_the_threshold_run(
    redistribution: Redistribution, parameters: dict[str, Any], expected: list[list[int]]
) -> None:
    assert scored(redistribution, WEIGHTS, IDS, **parameters).int().tolist() == expected


@pytest.mark.parametrize("redistribution", SCORED)
def test_the_least_threshold_keeps_everything(redistribution: Redistribution) -> None:
    weights, ids = routing(2, 6, 4)
    least = -10.0 if redistribution == "top-p" else 0.0
    real = torch.ones(2, 6, dtype=torch.bool)
    kept = POLICIES[redistribution](weights, ids, real, LayerParameters(4, least, (0.5,) * 8))
    assert kept.mask.all()
    assert kept.margin == (math.inf if redistribution != "top-p" else pytest.approx(9, abs=1))


@pytest.mark.parametrize("redistribution", SCORED)
def test_scored_tokens_depend_on_no_other(redistribution: Redistribution) -> None:
    weights, ids = routing(4, 6, 4)
    real = left_padded(4, 6)
    threshold = scores(redistribution, weights, ids, torch.linspace(0.5, 2, 8))[:, 1:].median()
    given = LayerParameters(2, float(threshold), torch.linspace(0.5, 2, 8))
    together = keep_mask(redistribution, weights, ids, real, given)
    for token in range(24):
        one = slice(token, token + 1)
        alone = keep_mask(redistribution, weights[one], ids[one], real.view(-1, 1)[one], given)
        assert torch.equal(together[one], alone)
    assert 0.2 < together[real.flatten(), 1:].float().mean() < 0.8


def test_margin_is_in_units_of_the_router_weight() -> None:
    real = torch.ones(1, 2, dtype=torch.bool)

    def margin(redistribution: Redistribution, threshold: float, *sizes: float) -> float:
        given = LayerParameters(2.0, threshold, sizes or None)
        return POLICIES[redistribution](WEIGHTS, IDS, real, given).margin

    assert margin("threshold", 0.25 - 0.01) == pytest.approx(0.01)
    assert margin("ratio", 0.5 - 0.01) == pytest.approx(0.005)
    assert margin("top-p", -0.51) == pytest.approx(0.01)
    assert margin("price", 50 - 1, 1e-9, 200, 1e-9) == pytest.approx(1 / 200)


def test_each_decision_has_its_gap() -> None:
    real = torch.ones(1, 1, dtype=torch.bool)
    weights, ids = torch.tensor([[0.9, 0.5, 0.3, 0.25]]), torch.tensor([[0, 1, 2, 3]])
    gaps = POLICIES["threshold"](weights, ids, real, LayerParameters(2.0, 0.4)).gaps
    # At the border the lead in rank counts as well where it is less.
    torch.testing.assert_close(gaps, torch.tensor([[math.inf, 0.1, 0.1, 0.15]]))
    capped = POLICIES["threshold"](weights, ids, real, LayerParameters(3.0, 0.1, cap=1.0)).gaps
    torch.testing.assert_close(capped, torch.tensor([[math.inf, 0.25, 0.05, 0.05]]))


def test_margin_counts_ranks_that_decide() -> None:
    real = torch.ones(1, 1, dtype=torch.bool)
    ids = torch.tensor([[0, 1, 2]])
    weights = torch.tensor([[0.5, 0.49, 0.1]])
    # Whichever of experts 0 and 1 ranks first runs.
    given = LayerParameters(1.0, 5.0, (1.0, 1.0, 1.0))
    assert POLICIES["price"](weights, ids, real, given).margin == pytest.approx(0.01)
    # Expert 1 runs at either rank, expert 0 at the first only.
    given = LayerParameters(1.0, 5.0, (1.0, 20.0, 1.0))
    assert POLICIES["price"](weights, ids, real, given).margin == pytest.approx(0.01)
    # Both run at either rank.
    given = LayerParameters(1.0, 5.0, (20.0, 20.0, 1.0))
    assert POLICIES["price"](weights, ids, real, given).margin > 0.1
    # Expert 1 is taken before expert 2, by little.
    weights = torch.tensor([[0.5, 0.2, 0.19]])
    top_p = POLICIES["top-p"](weights, ids, real, LayerParameters(2.0, -0.6))
    assert top_p.mask.tolist() == [[True, True, False]]
    assert top_p.margin == pytest.approx(0.01)


@settings(max_examples=60, deadline=None)
@given(
    redistribution=st.sampled_from(SCORED),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    candidates=st.integers(1, 6),
    k=st.floats(1, 3),
    cap=st.floats(1, 3),
    seed=st.integers(0, 99),
)
def test_a_cap_is_never_exceeded_and_the_highest_scores_win(
    redistribution: Redistribution,
    batch: int,
    length: int,
    candidates: int,
    k: float,
    cap: float,
    seed: int,
) -> None:
    weights, ids = routing(batch, length, candidates, seed=seed)
    weights = (weights * 20).round() / 20  # plenty of ties
    real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    sizes = torch.linspace(0.5, 2, 12)
    free = LayerParameters(k, -0.5 if redistribution == "top-p" else 0.05, sizes)
    uncapped = keep_mask(redistribution, weights, ids, real, free)
    capped = keep_mask(redistribution, weights, ids, real, dataclasses.replace(free, cap=cap))
    room = math.floor((min(candidates, cap * k) - 1) * int(real.sum()))
    passed = int(uncapped[:, 1:].sum())
    assert int(capped[:, 1:].sum()) == min(passed, room)
    assert torch.equal(capped[:, 0], real.flatten())
    assert not (capped & ~uncapped).any()
    score = scores(redistribution, weights, ids, sizes)[:, 1:]
    lost = uncapped[:, 1:] & ~capped[:, 1:]
    if lost.any() and capped[:, 1:].any():
        assert score[lost].max() <= score[capped[:, 1:]].min()
