"""Which candidates run, in PyTorch: the policies against ten lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alloc_moe.compiler.records import SCORED
from alloc_moe.compiler.reference.policies import (
    LayerParameters,
    adjust_weights,
    keep_mask,
    rank_candidates,
)


def best(scores: NDArray, wanted: int) -> NDArray[np.bool_]:
    """Return which of [tokens, candidates] are the best; of equal ones those that come first."""
    order = np.argsort(-scores.ravel(), kind="stable")
    order = order[np.isfinite(scores.ravel()[order])][:wanted]
    return np.isin(np.arange(scores.size), order).reshape(scores.shape)


def scores(policy: str, w: NDArray, sizes: NDArray, overlap: float) -> NDArray:
    """Return what candidates are compared by, in float32 as the graph computes it."""
    if policy == "threshold":
        return w
    if policy == "ratio":
        return w / np.maximum(w[:, :1], np.float32(1e-30))
    if policy == "top-p":
        return -np.concatenate([np.zeros_like(w[:, :1]), np.cumsum(w[:, :-1], axis=1)], axis=1)
    s = sizes * w
    after = np.cumsum(s[:, ::-1], axis=1)[:, ::-1] - s if overlap else np.zeros_like(s)
    for column in range(s.shape[1]):  # from the last on, as float32 adds them
        after[:, column] = sum(s[:, :column:-1].T, np.zeros(len(s), np.float32))
    return np.sqrt(s * (s + after * np.float32(2 * overlap))) if overlap else s


def kept(policy: str, w: NDArray, sizes: NDArray, real: NDArray, p: LayerParameters) -> NDArray:
    """Return what runs [tokens, candidates]: ten lines of numpy."""
    tokens, count = w.shape
    if policy in SCORED:
        score = scores(policy, w, sizes, p.overlap)
        others = (score >= np.float32(p.threshold))[:, 1:] & real.reshape(-1, 1)
        room = math.floor(p.quota(count) * int(real.sum())) if p.cap is not None else others.size
        chosen = best(np.where(others, score[:, 1:], -np.inf), room)
        return np.concatenate([real.reshape(-1, 1), chosen], axis=1)
    k = int(p.k)
    if policy == "none" or k in (1, count):
        return real.reshape(-1, 1) & (np.arange(count) < k)
    pools = np.zeros(tokens, int) if policy == "batch" else np.arange(tokens) // real.shape[1]
    mask = np.concatenate([real.reshape(-1, 1), np.zeros((tokens, count - 1), bool)], axis=1)
    for pool in np.unique(pools):
        mine = (pools == pool) & real.ravel()
        contest = np.where(mine[:, None], w[:, 1:], -np.inf)
        mask[:, 1:] |= best(contest, (k - 1) * int(mine.sum()))
    return mask


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, NDArray, NDArray, NDArray, LayerParameters]:
    policy = draw(st.sampled_from(["none", "batch", "sequence", *SCORED]))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    experts = draw(st.integers(1, 8))
    count = draw(st.integers(1, experts))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(size=(batch * length, experts)) * draw(st.sampled_from([0.0, 1, 5]))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    if draw(st.booleans()):  # ties, and zeros
        weights = np.round(weights * 4) / np.float32(4)
    ids = np.argsort(random.random((batch * length, experts)), axis=1)[:, :count]
    chosen = np.take_along_axis(weights, ids, axis=1)
    real = random.random((batch, length)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    parameters = LayerParameters(
        k=draw(st.integers(1, count)),
        threshold=float(
            np.float32(draw(st.sampled_from([-2.0, -0.5, 0.0, 0.125, 0.25, 0.7, 9.0])))
        ),
        sizes=tuple(np.round(random.random(experts) * 8).astype(np.float32).tolist()),
        cap=draw(st.sampled_from([None, None, 1.0, 1.25, 3.0])) if policy in SCORED else None,
        overlap=draw(st.sampled_from([0.0, 0.25, 1.0])) if policy == "price" else 0.0,
    )
    return policy, chosen, ids, real, parameters


@settings(settings.get_profile("fuzz"))
@given(cases())
def test_policies_keep_what_ten_lines_of_numpy_keep(
    case: tuple[str, NDArray, NDArray, NDArray, LayerParameters],
) -> None:
    policy, weights, ids, real, parameters = case
    ranked, order = rank_candidates(torch.from_numpy(weights), torch.from_numpy(ids))
    found = keep_mask(policy, ranked, order, torch.from_numpy(real), parameters).numpy()  # type: ignore[arg-type]

    by_weight = np.argsort(-weights, axis=1, kind="stable")
    own = np.take_along_axis(weights, by_weight, axis=1)
    np.testing.assert_array_equal(ranked.numpy(), own)
    assert parameters.sizes is not None
    sizes = np.float32(parameters.sizes)[np.take_along_axis(ids, by_weight, axis=1)]
    np.testing.assert_array_equal(found, kept(policy, own, sizes, real, parameters))

    assert not found[~real.ravel()].any()
    assert found[real.ravel(), 0].all()
    if policy not in SCORED:
        assert found.sum() == parameters.k * real.sum()
    for mode in ("keep", "renorm"):
        combined = adjust_weights(mode, ranked, torch.from_numpy(found)).numpy()  # type: ignore[arg-type]
        assert (combined[~found] == 0).all()
        assert np.isfinite(combined).all()
        if mode == "renorm":
            share = own[real.ravel()].sum(axis=1)
            some = (own * found)[real.ravel()].sum(axis=1) > 0
            np.testing.assert_allclose(
                combined[real.ravel()].sum(axis=1)[some], share[some], rtol=1e-5
            )


def test_an_unknown_policy_is_none() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(KeyError):
        keep_mask("nonsense", one, one.long(), one > 0, LayerParameters(1))  # type: ignore[arg-type]
