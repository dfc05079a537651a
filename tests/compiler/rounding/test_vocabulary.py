"""Rows of the head by the tokens where they might be said."""

from __future__ import annotations

import pytest
import torch

from alloc_moe.compiler.rounding import vocabulary as module
from alloc_moe.compiler.rounding.gptq import round_products
from alloc_moe.compiler.rounding.vocabulary import SaidTokens, row_groups
from alloc_moe.passes.blockwise import BlockFormat

TOPICS, WORDS, COLUMNS, TOKENS = 4, 32, 64, 1024
FORM = BlockFormat(4, 64)


@pytest.fixture
def topics() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a head [TOPICS * WORDS, C], and states [T, C] of one topic each."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.nn.functional.normalize(
        torch.randn(TOPICS, COLUMNS, generator=generator), dim=1
    )
    words = torch.randn(TOPICS, WORDS, COLUMNS, generator=generator) * 0.3
    states = torch.randn(TOPICS, TOKENS // TOPICS, COLUMNS, generator=generator) * 0.5
    # Each topic's states spread in directions of their own.
    spread = torch.rand(TOPICS, 1, COLUMNS, generator=generator) ** 4 * 5
    return (centers[:, None] + words).flatten(0, 1), (
        2 * centers[:, None] + states * spread
    ).flatten(0, 1)


def rounded(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    groups = row_groups(weight)
    result = torch.empty_like(weight)
    tokens = SaidTokens.of(states, states, states @ weight.mT, groups)
    for group, hessian in enumerate(tokens.hessians()):
        rows = groups == group
        result[rows] = round_products(weight[None, rows], hessian[None], FORM)[0]
    return result


def test_rows_of_like_direction_are_together(topics: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, _ = topics
    groups = row_groups(weight).view(TOPICS, WORDS)
    assert 2 <= int(groups.max()) + 1 <= TOPICS * WORDS // 16
    together = [set(each.tolist()) for each in groups]
    assert sum(map(len, together)) == len(set.union(*together))  # no group has two topics


def test_a_group_counts_tokens_by_what_its_rows_might_say() -> None:
    states, logits = torch.eye(2), torch.tensor([[0.0, 0.0, -50.0, -50.0], [-50, -50, 3, 0]])
    tokens = SaidTokens.of(states, 2 * states, logits, torch.tensor([0, 0, 1, 1]))
    said = torch.sigmoid(torch.tensor(3.0))
    torch.testing.assert_close(
        tokens.shares, torch.tensor([[0.5, 0], [0, 2 * said * (1 - said)]]), rtol=1e-6, atol=1e-9
    )
    own, common = torch.diag(torch.tensor([2.0, 0])), 0.5 * torch.eye(2)
    first, second = tokens.hessians()
    torch.testing.assert_close(first, own + common)
    torch.testing.assert_close(second, own.flip(0, 1) + common)
    torch.testing.assert_close(tokens.common.drift, common)


def test_a_group_goes_by_the_tokens_that_count_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2 * 3)
    shares = torch.tensor([[0.1], [0.4], [0.0], [0.3]])
    states = torch.eye(4)[:, :3]
    (hessian,) = SaidTokens(states, states, shares).hessians()
    own = torch.diag(torch.tensor([0.0, 0.4, 0.0])) / 0.2
    torch.testing.assert_close(hessian, own + 0.5 * torch.eye(3))


def test_words_are_said_more_as_before_than_by_all_tokens_alike(
    topics: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, states = topics

    def divergence() -> float:
        full, now = states @ weight.mT, states @ rounded(weight, states).mT
        return torch.nn.functional.kl_div(
            now.log_softmax(1), full.log_softmax(1), log_target=True, reduction="batchmean"
        ).item()

    apart = divergence()
    monkeypatch.setattr(module, "_GROUPS", 1)
    assert apart < 0.9 * divergence()


def test_a_small_head_and_one_whose_rows_are_equal_have_groups() -> None:
    assert row_groups(torch.randn(3, 16)).tolist() == [0, 0, 0]
    assert len(row_groups(torch.ones(64, 16)).unique()) == 1


def test_no_group_is_empty_where_many_rows_are_equal() -> None:
    weight = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    weight[200:] = weight[200]
    groups = row_groups(weight)
    assert len(set(groups[:200].tolist())) > 1
    assert groups.bincount().all()


def test_rows_that_are_never_said_go_by_all_tokens() -> None:
    states, logits = torch.eye(2), torch.tensor([[0.0, 0.0, -400.0], [0, 0, -400]])
    *_, never = SaidTokens.of(states, states, logits, torch.tensor([0, 0, 1])).hessians()
    torch.testing.assert_close(never, 0.5 * torch.eye(2))
