"""What tokens make of experts' sizes, in PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.compiler.reference.token_sizes import for_tokens
from alloc_moe.runtime.artifact.token_sizes import LIMIT, TokenSizes
from alloc_moe.runtime.errors import ArtifactError

EXPERTS, HIDDEN, TOKENS = 6, 4, 9
SIZES = tuple(np.linspace(0.5, 2, EXPERTS).tolist())
RANDOM = np.random.default_rng(1)
STORED = TokenSizes.of(RANDOM.normal(size=(HIDDEN, EXPERTS)), RANDOM.normal(size=EXPERTS))
STATES = torch.from_numpy(RANDOM.normal(size=(TOKENS, HIDDEN)).astype(np.float32))
REAL = torch.ones(1, TOKENS, dtype=torch.bool)


def candidates() -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)).topk(4)
    return rank_candidates(weights, ids)


def test_without_them_a_layer_is_given_what_it_was() -> None:
    parameters = LayerParameters(2.0, 0.3, SIZES)
    assert for_tokens(parameters, STATES) is parameters


def test_token_sizes_of_another_model_are_refused() -> None:
    parameters = LayerParameters(2.0, 0.3, SIZES, token_sizes=STORED)
    with pytest.raises(ArtifactError, match="for a hidden size of 4, but 3 enter the experts"):
        for_tokens(parameters, STATES[:, :3])


def test_sizes_are_multiplied_by_an_exponential_that_is_bounded() -> None:
    found = for_tokens(LayerParameters(2.0, 0.3, SIZES, token_sizes=STORED), 3 * STATES).sizes
    weights, bias = (array.astype(np.float64) for array in STORED.arrays)
    logs = 3 * STATES.numpy() @ weights + bias
    assert np.abs(logs).max() > LIMIT > np.abs(logs).min()
    expected = np.array(SIZES) * np.exp(np.clip(logs, -LIMIT, LIMIT))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_token_is_decided_by_its_own_sizes(overlap: float) -> None:
    weights, ids = candidates()
    parameters = LayerParameters(2.0, 0.4, SIZES, overlap=overlap, token_sizes=STORED)
    together = for_tokens(parameters, STATES)
    score = scores("price", weights, ids, together.sizes, overlap)
    kept = keep_mask("price", weights, ids, REAL, together)
    assert 0 < kept[:, 1:].float().mean() < 1
    for token in range(TOKENS):
        one = slice(token, token + 1)
        alone = for_tokens(parameters, STATES[one])
        assert alone.sizes is not None
        sizes = [float(size) for size in torch.as_tensor(alone.sizes)[0]]
        expected = scores("price", weights[one], ids[one], sizes, overlap)
        assert torch.allclose(score[one], expected, rtol=1e-5)
        mask = keep_mask("price", weights[one], ids[one], REAL[:, one], alone)
        assert torch.equal(mask, kept[one])


def test_equal_factors_change_no_decision_but_the_price() -> None:
    weights, ids = candidates()
    even = TokenSizes.of(np.zeros((HIDDEN, EXPERTS)), np.full(EXPERTS, math.log(2)))
    plain = keep_mask("price", weights, ids, REAL, LayerParameters(2.0, 0.4, SIZES))
    twice = for_tokens(LayerParameters(2.0, 0.8, SIZES, token_sizes=even), STATES)
    assert torch.equal(keep_mask("price", weights, ids, REAL, twice), plain)
    free = for_tokens(LayerParameters(2.0, 0.0, SIZES, token_sizes=STORED), STATES)
    assert keep_mask("price", weights, ids, REAL, free).all()
