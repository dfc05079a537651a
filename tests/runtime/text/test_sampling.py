"""What is drawn from logits, exactly."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.text.sampling import Sampling, nucleus, sample


def draws(logits: list[float], sampling: Sampling, count: int) -> np.ndarray:
    """Return the share of each token among many draws from the same logits."""
    row = np.array([logits], np.float32)
    generators = sampling.generators(1)
    tokens = [int(sample(row, sampling, generators)[0]) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([[0, 3, 3, 1], [5, 0, 0, 0]], np.float32)
    assert sample(logits, Sampling(), []).tolist() == [1, 0]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    shares = draws(logits.tolist(), Sampling(temperature=0.7, seed=1), 20_000)
    np.testing.assert_allclose(shares, expected, atol=0.012)  # three standard errors


def test_draws_follow_the_renormalised_nucleus() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    shares = draws(logits.tolist(), Sampling(temperature=1.0, top_p=0.6), 20_000)
    np.testing.assert_allclose(shares, [4 / 7, 3 / 7, 0, 0], atol=0.012)


def test_temperature_towards_zero_equals_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    cold = Sampling(temperature=1e-4)
    greedy = sample(logits, Sampling(), [])
    assert sample(logits, cold, cold.generators(8)).tolist() == greedy.tolist()


def test_tiny_top_p_equals_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    narrow = Sampling(temperature=5.0, top_p=1e-9)
    greedy = sample(logits, Sampling(), [])
    assert sample(logits, narrow, narrow.generators(8)).tolist() == greedy.tolist()


@pytest.mark.parametrize(
    ("top_p", "ids"),
    [(0.39, [1]), (0.4, [1]), (0.41, [1, 2]), (0.95, [1, 2, 3]), (0.951, [1, 2, 3, 0])],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, ids: list[int]) -> None:
    weights = np.array([0.0625, 0.5, 0.375, 0.3125])  # shares 0.05, 0.4, 0.3, 0.25
    assert nucleus(weights, top_p).tolist() == ids


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.int64, st.integers(1100, 3000), elements=st.integers(0, 6)),
    st.floats(0.01, 0.999),
    st.booleans(),
)
def test_quick_nucleus_equals_a_full_sort(levels: np.ndarray, top_p: float, peaked: bool) -> None:
    weights = 2.0**levels  # many ties, sums exact
    if peaked:
        weights[:5] = 2.0**20
    order = np.argsort(-weights, kind="stable")
    size = int(np.argmax(weights[order].cumsum() >= top_p * weights.sum())) + 1
    assert nucleus(weights, top_p).tolist() == order[:size].tolist()


def test_same_seed_same_tokens_other_seed_others() -> None:
    logits = np.zeros((1, 1000), np.float32)

    def tokens(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generators = sampling.generators(1)
        return [int(sample(logits, sampling, generators)[0]) for _ in range(5)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_a_rows_draw_does_not_depend_on_its_batch_mates() -> None:
    random = np.random.default_rng(0)
    mine, others = random.normal(size=(1, 300)), random.normal(size=(4, 300))
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=9)
    alone = sample(mine, sampling, sampling.generators(1))
    together = sample(np.concatenate([mine, others]), sampling, sampling.generators(5))
    assert together[0] == alone[0]


def test_rows_with_equal_logits_draw_differently() -> None:
    sampling = Sampling(temperature=1.0)
    tokens = sample(np.zeros((4, 10_000), np.float32), sampling, sampling.generators(4))
    assert len(set(tokens.tolist())) == 4


def test_float16_logits_are_drawn_from_in_full_precision() -> None:
    sampling = Sampling(temperature=0.01)
    logits = np.array([[60000, 59000, -60000]], np.float16)
    assert sample(logits, sampling, sampling.generators(1)).tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_reported(bad: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    with pytest.raises(ArtifactError, match=r"no finite numbers.*float16"):
        sample(np.array([[0, bad, 1]]), sampling, sampling.generators(1))


def test_masked_out_tokens_are_never_drawn() -> None:
    assert draws([0.0, float("-inf"), 0.0], Sampling(temperature=2.0), 200)[1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top-p is 1.5"),
        ({"top_p": 0.9}, "top-p 0.9 has no effect at temperature 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_rejected(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("penalty", [1.8, 0.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    order = logits.argsort()
    seen = [row[[-1, 0, -1]].tolist() for row in order[:3]] + [[int(row[-2])] for row in order[3:]]
    sampling = Sampling(repetition_penalty=penalty)
    expected = [
        int(
            RepetitionPenaltyLogitsProcessor(penalty)(
                torch.tensor([ids]), torch.tensor(row[None])
            ).argmax()
        )
        for ids, row in zip(seen, logits, strict=True)
    ]
    chosen = sample(logits, sampling, [], seen).tolist()
    assert chosen == expected
    assert chosen != sample(logits, Sampling(), []).tolist()


def test_a_penalty_moves_negative_logits_down_too() -> None:
    logits = np.array([[-1.0, -1.5, -9.0]], np.float32)
    assert sample(logits, Sampling(repetition_penalty=2.0), [], [{0}]).tolist() == [1]


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.2, 4), (0.3, 3), (0.6, 2), (1.0, 1)])
def test_min_p_keeps_what_transformers_keeps(min_p: float, kept: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper

    logits = np.log([0.4, 0.3, 0.2, 0.1]).astype(np.float32)
    warped = MinPLogitsWarper(min_p)(None, torch.tensor(logits[None]))
    expected = torch.softmax(warped, -1)[0].numpy()
    assert np.count_nonzero(expected) == kept
    shares = draws(logits.tolist(), Sampling(temperature=1.0, min_p=min_p), 20_000)
    np.testing.assert_allclose(shares, expected, atol=0.012)
    assert np.count_nonzero(shares) == kept


def test_min_p_is_of_the_probabilities_at_the_temperature() -> None:
    # At temperature 2 a share of 0.25 becomes one of 0.5.
    logits = np.log([0.8, 0.2]).tolist()
    assert draws(logits, Sampling(temperature=2.0, min_p=0.4), 2000)[1] > 0.3
    assert draws(logits, Sampling(temperature=1.0, min_p=0.4), 2000)[1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": -0.1, "temperature": 1.0}, "min-p is -0.1"),
        ({"min_p": float("nan"), "temperature": 1.0}, "min-p is nan"),
        ({"min_p": 0.1}, "min-p 0.1 has no effect at temperature 0"),
        ({"repetition_penalty": 0.0}, "repetition penalty is 0.0. Give a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition penalty is inf"),
        ({"min_p": "0.1", "temperature": 1.0}, "min-p is 0.1. Give"),
        ({"repetition_penalty": None}, "repetition penalty is None. Give"),
    ],
)
def test_new_options_out_of_range_are_rejected(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GenerationError, match=re.escape(message)):
        Sampling(**settings)  # type: ignore[arg-type]
