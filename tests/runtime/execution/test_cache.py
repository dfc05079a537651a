"""Caches that grow, fork and are written in place, and logits that are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.cache import Cache
from alloc_moe.runtime.execution.session import ArtifactSession, open_session

IDS = np.random.default_rng(3).integers(0, 257, (2, 12))
MASK = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12])


@pytest.fixture(params=["copied", "shared"])
def session(request: pytest.FixtureRequest, toy: Path, shared_toy: Path) -> ArtifactSession:
    path = {"copied": toy, "shared": shared_toy}[request.param]
    return open_session(path, ep="cpu", count_activations=True)


@pytest.fixture
def shared(shared_toy: Path) -> ArtifactSession:
    return open_session(shared_toy, ep="cpu")


def in_pieces(session: ArtifactSession, lengths: list[int], cache: Cache) -> NDArray[np.floating]:
    """Return the logits of all tokens, run in pieces of these lengths."""
    logits, start = [], 0
    for length in lengths:
        end = start + length
        ids, mask = IDS[:, start:end], MASK[:, :end]
        logits.append(session.run(ids, attention_mask=mask, cache=cache).logits)
        start = end
    return np.concatenate(logits, axis=1)


@pytest.fixture
def expected(toy: Path) -> NDArray[np.floating]:
    """The logits of one call with the copying graph."""
    return open_session(toy, ep="cpu").run(IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, *[1] * 7], [3, 4, 1, 4]], ids=str)
@pytest.mark.parametrize("capacity", [0, 7, 12, 40])
def test_pieces_equal_one_call_whatever_the_room(
    session: ArtifactSession, expected: NDArray[np.floating], lengths: list[int], capacity: int
) -> None:
    cache = session.empty_cache(2, capacity=capacity)
    found = in_pieces(session, lengths, cache)
    real = MASK > 0
    np.testing.assert_allclose(found[real], expected[real], atol=2e-4)
    assert cache.length == 12
    assert cache.capacity >= max(12, capacity)


def test_the_output_has_the_cache_that_was_given(session: ArtifactSession) -> None:
    cache = session.empty_cache(2)
    assert session.run(IDS, cache=cache).cache is cache


def test_a_shared_cache_is_not_copied(shared: ArtifactSession) -> None:
    cache = shared.empty_cache(2, capacity=12)
    places = [value.data_ptr() for value in cache.values]
    in_pieces(shared, [8, *[1] * 4], cache)
    assert [value.data_ptr() for value in cache.values] == places
    assert {tuple(value.shape()) for value in cache.values} == {(2, 1, 12, 8)}


def test_a_cache_that_must_grow_doubles(shared: ArtifactSession) -> None:
    cache = shared.empty_cache(2)
    capacities = []
    for end in (3, 4, 5, 6, 7):
        shared.run(IDS[:, cache.length : end], cache=cache)
        capacities.append(cache.capacity)
    assert capacities == [3, 6, 6, 6, 12]


def test_the_binding_is_used_again_until_the_cache_moves(shared: ArtifactSession) -> None:
    cache = shared.empty_cache(2, capacity=5)
    bindings: list[onnxruntime.IOBinding | None] = []
    for _ in range(6):
        shared.run(IDS[:, :1], cache=cache)
        bindings.append(cache.binding)
    assert len({id(binding) for binding in bindings[:5]}) == 1
    assert bindings[5] is not bindings[4]


def test_a_fork_can_be_continued_on_its_own(session: ArtifactSession) -> None:
    cache = session.empty_cache(2, capacity=12)
    session.run(IDS[:, :4], attention_mask=MASK[:, :4], cache=cache)
    fork = cache.fork()
    other = session.run(IDS[::-1, :1], cache=fork).logits
    first = session.run(IDS[:, 4:5], cache=cache).logits
    again = session.run(IDS[:, 5:6], cache=cache).logits
    assert (cache.length, fork.length) == (6, 5)
    assert np.abs(other - first).max() > 0.1
    fresh = session.empty_cache(2)
    session.run(IDS[:, :4], attention_mask=MASK[:, :4], cache=fresh)
    np.testing.assert_allclose(session.run(IDS[:, 4:5], cache=fresh).logits, first, atol=1e-5)
    np.testing.assert_allclose(session.run(IDS[:, 5:6], cache=fresh).logits, again, atol=1e-5)


def test_columns_keep_the_mask_they_came_with(session: ArtifactSession) -> None:
    """Of a later mask only the new columns are looked at; without one, they are real."""
    given, default = session.empty_cache(2), session.empty_cache(2)
    for cache in (given, default):
        session.run(IDS[:, :6], attention_mask=MASK[:, :6], cache=cache)
    last = session.run(IDS[:, 6:7], attention_mask=MASK[:, :7], cache=given).logits
    np.testing.assert_array_equal(session.run(IDS[:, 6:7], cache=default).logits, last)


def test_several_rows_continued_by_several_tokens_are_counted_as_one_call(
    session: ArtifactSession, sizes: object
) -> None:
    cache = session.empty_cache(2)
    session.run(IDS[:, :5], cache=cache)
    output = session.run(IDS[:, 5:9], cache=cache)
    assert output.logits.shape[:2] == (2, 4)
    assert output.rows is not None
    assert [len(rows) for rows in output.rows] == [8, 8]


@pytest.mark.parametrize("change", [{"redistribution": "batch"}, {"cap": 1.2}], ids=str)
def test_competing_rows_cannot_be_continued_by_several_tokens(
    make_toy: Callable[..., Path],
    tmp_path: Path,
    plan: AllocationPlan,
    change: dict[str, str | float],
) -> None:
    pooled = dataclasses.replace(plan, **change)  # type: ignore[arg-type]
    path = make_toy(tmp_path / "a.onnx", shared=True, plan=pooled.to_json())
    session = open_session(path, ep="cpu")
    cache = session.empty_cache(2)
    session.run(IDS[:, :5], cache=cache)
    session.run(IDS[:, 5:6], cache=cache)
    message = r"2 sequences can't be continued by 3 tokens each .* one by one"
    with pytest.raises(GenerationError, match=message):
        session.run(IDS[:, 6:9], cache=cache)
    assert cache.length == 6


@pytest.mark.parametrize("keep", [1, 3, 20])
def test_the_last_logits_are_those_of_all(session: ArtifactSession, keep: int) -> None:
    every = session.run(IDS, attention_mask=MASK).logits
    last = session.run(IDS, attention_mask=MASK, logits_to_keep=keep).logits
    np.testing.assert_allclose(last, every[:, -keep:], atol=1e-5)


def test_what_a_call_asks_for_does_not_stay_with_the_cache(
    make_toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_toy(tmp_path / "a.onnx", shared=True, keeps=True, dial=True)
    session = open_session(path, ep="cpu", count_activations=True)
    cache = session.empty_cache(1, capacity=12)
    found = []
    for price, keep in ((None, None), (2.0, 1), (None, None), (0.0, 2)):
        output = session.run(IDS[:1, :3], cache=cache, price=price, logits_to_keep=keep)
        found.append((output.activations, output.logits.shape[1]))
    assert [length for _, length in found] == [3, 1, 3, 2]
    (_, none, usual, all_) = (counts for counts, _ in found)
    assert none is not None
    assert usual is not None
    assert all_ is not None
    assert sum(none) < sum(usual) < sum(all_)


def test_a_truncated_cache_goes_on_from_there(session: ArtifactSession) -> None:
    cache = session.empty_cache(2)
    first = in_pieces(session, [5, 7], cache)
    cache.truncate(5)
    again = session.run(IDS[:, 5:], attention_mask=MASK, cache=cache).logits
    real = MASK[:, 5:] > 0
    np.testing.assert_allclose(again[real], first[:, 5:][real], atol=2e-4)
    cache.truncate(0)
    whole = session.run(IDS, attention_mask=MASK, cache=cache).logits
    np.testing.assert_allclose(whole[MASK > 0], first[MASK > 0], atol=2e-4)
    with pytest.raises(ValueError, match="A cache of 12 columns can't be cut to 13"):
        cache.truncate(13)


def test_a_copied_cache_of_bfloat16_is_truncated_too(
    make_toy: Callable[..., Path], tmp_path: Path
) -> None:
    session = open_session(make_toy(tmp_path / "out.onnx", cache="bfloat16"), ep="cpu")
    cache = session.run(IDS[:, :5]).cache
    expected = session.run(IDS[:, 5:], cache=cache.fork()).logits
    in_between = session.run(IDS[:, 7:], cache=cache).cache
    in_between.truncate(5)
    found = session.run(IDS[:, 5:], cache=in_between).logits
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("wanted", "lengths", "capacities"),
    [
        (0, [5, 60, 70, 1600], [0, 69, 69, 134, 1800]),  # a column in eight more, 64 at least
        (80, [5, 70, 81], [0, 69, 80, 145]),  # no more than asked for, unless that is too little
    ],
)
def test_a_latent_cache_has_little_more_room_than_it_needs(
    shared: ArtifactSession, wanted: int, lengths: list[int], capacities: list[int]
) -> None:
    slots = [dataclasses.replace(slot, latent=True) for slot in shared.slots]
    cache = Cache(slots, batch=2, capacity=wanted)
    found = [cache.capacity]
    for length in lengths:
        cache.reserve(length)
        found.append(cache.capacity)
    assert found == capacities
    assert all(not value.numpy().any() for value in cache.values)  # finite beyond the past
    fork = cache.fork()
    fork.reserve(cache.capacity)
    assert fork.capacity == cache.capacity
