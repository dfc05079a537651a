"""Loss in windows, and the activations counted with it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.session import open_session
from alloc_moe.runtime.measure.evaluate import (
    Evaluation,
    default_window,
    evaluate,
    evaluate_artifact,
    token_losses,
    windows,
)
from alloc_moe.runtime.text.hold import held_budget

TEXT = list(b"It is a truth universally acknowledged, that a single man in possession ...")


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_windows_score_each_token_but_the_first_once(
    count: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    parts = list(windows(count, window=window, stride=stride))
    scored = [token for part in parts for token in range(part.first_scored, part.stop)]
    assert scored == list(range(1, count))
    for number, part in enumerate(parts):
        assert part.start == number * stride
        assert part.stop == min(part.start + window, count)
        context = part.first_scored - part.start
        assert context >= (window - stride if number else 1)


def random_model(ids: np.ndarray) -> np.ndarray:
    """Return logits that depend on all tokens of the call so far."""
    states = np.cumsum(ids[0] * 7919 % 1013)
    return np.stack([np.random.default_rng(int(s)).normal(size=256) for s in states])[None] * 3


def test_loss_equals_brute_force() -> None:
    window, stride = 16, 5
    expected = []
    for target in range(1, len(TEXT)):
        first = next(
            part.start
            for part in windows(len(TEXT), window=window, stride=stride)
            if part.first_scored <= target < part.stop
        )
        logits = random_model(np.array([TEXT[first:target]]))[0, -1].astype(np.float64)
        expected.append(np.log(np.exp(logits).sum()) - logits[TEXT[target]])
    result = evaluate(random_model, TEXT, window=window, stride=stride)
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.tokens_scored == len(TEXT) - 1
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


def test_losses_are_exact_for_large_logits_and_many_rows() -> None:
    random = np.random.default_rng(0)
    logits = (random.normal(size=(200, 50)) * 5 + 10_000).astype(np.float32)
    targets = random.integers(0, 50, 200)
    exact = logits.astype(np.longdouble)
    expected = np.log(np.exp(exact - 10_000).sum(axis=1)) + 10_000 - exact[np.arange(200), targets]
    np.testing.assert_allclose(token_losses(logits, targets), expected.astype(float), atol=1e-5)


def test_float16_logits_are_scored_in_float32() -> None:
    logits = np.array([[60000, 60000, -60000]], np.float16)
    assert token_losses(logits, np.array([1]))[0] == pytest.approx(math.log(2))


def test_progress_adds_up_to_the_tokens_scored() -> None:
    told: list[int] = []
    evaluate(random_model, TEXT, window=16, stride=8, on_scored=told.append)
    assert sum(told) == len(TEXT) - 1
    assert len(told) > 2


def test_an_artifacts_loss_and_activations_come_from_the_same_calls(
    toy: Path, sizes: SimpleNamespace
) -> None:
    counting = open_session(toy, count_activations=True)
    result = evaluate_artifact(counting, TEXT, window=20, stride=10)
    run = sum(part.stop - part.start for part in windows(len(TEXT), window=20, stride=10))
    assert result.tokens_run == run
    assert result.activations == (run * sizes.active,) * sizes.layers
    assert result.activations_per_token == (sizes.active,) * sizes.layers
    plain = evaluate_artifact(open_session(toy), TEXT, window=20, stride=10)
    assert (plain.loss, plain.activations) == (result.loss, None)
    assert plain.activations_per_token is None


def test_decoding_token_by_token_gives_the_same_loss_without_redistribution(toy: Path) -> None:
    session = open_session(toy, count_activations=True)
    at_once = evaluate_artifact(session, TEXT, window=20, stride=10)
    by_token = evaluate_artifact(session, TEXT, window=20, stride=10, decode=True)
    assert by_token.loss == pytest.approx(at_once.loss, abs=1e-5)
    assert by_token.activations == at_once.activations


@pytest.mark.parametrize("decode", [False, True])
def test_a_held_price_that_stays_changes_nothing(dial_bundle: Path, decode: bool) -> None:
    session = open_session(dial_bundle, ep="cpu", count_activations=True)
    hold = held_budget(session, 1.0).begin()  # all experts: there is nothing to steer
    held = evaluate_artifact(session, TEXT, window=40, stride=20, decode=decode, hold=hold)
    plain = evaluate_artifact(session, TEXT, window=40, stride=20, price=0.0)
    assert held.loss == pytest.approx(plain.loss, abs=1e-5)
    assert held.activations == plain.activations
    assert hold.tokens == held.tokens_run
    assert hold.executed == sum(held.activations or ())


def test_the_default_window_is_the_context_up_to_512(bundle: Path, sizes: SimpleNamespace) -> None:
    assert [default_window(length) for length in (None, 64, 4096)] == [512, 64, 512]
    result = evaluate_artifact(open_session(bundle), TEXT * 3)
    assert (result.window, result.stride) == (sizes.context, sizes.context // 2)


def test_a_window_longer_than_the_context_is_rejected(bundle: Path) -> None:
    with pytest.raises(GenerationError, match=r"window of 65 tokens doesn't fit .* context of 64"):
        evaluate_artifact(open_session(bundle), TEXT, window=65)


@pytest.mark.parametrize(
    ("count", "window", "stride", "message"),
    [
        (1, 8, 4, "text has 1 tokens; 2 are needed"),
        (9, 8, 8, "Windows of 8 tokens every 8 leave tokens without context"),
        (9, 8, 0, "Windows of 8 tokens every 0"),
    ],
)
def test_windows_that_cannot_score_all_tokens_are_rejected(
    count: int, window: int, stride: int, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        list(windows(count, window=window, stride=stride))


def test_a_hopeless_loss_has_infinite_perplexity() -> None:
    assert Evaluation(1e6, 1, 1, 2, 1).perplexity == math.inf
