"""Sequences that come and go get the tokens that they get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alloc_moe.runtime.execution.rows import gather_rows
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.serving.batch import Batch, Row
from alloc_moe.runtime.text.generation import generate
from alloc_moe.runtime.text.sampling import Sampling

SETTINGS = [Sampling(), Sampling(temperature=1.5, seed=4), Sampling(repetition_penalty=1.4)]


@pytest.fixture(params=["copied float", "copied float16", "copied bfloat16", "shared float"])
def session(
    request: pytest.FixtureRequest, make_toy: Callable[..., Path], tmp_path: Path
) -> ArtifactSession:
    kind, cache = request.param.split()
    toy = make_toy(
        tmp_path / "out.onnx", dial=True, cache=cache, shared=kind == "shared", keeps=True
    )
    return open_session(toy, ep="cpu", count_activations=True)


def alone(session: ArtifactSession, row: Row, count: int) -> list[int]:
    [ids] = generate(
        session, [row.prompt_ids], max_new_tokens=count, sampling=row.sampling, price=row.price
    )
    return ids


def come_and_go(session: ArtifactSession) -> None:
    """Have rows of many lengths join and leave, and compare each with what it gets alone."""
    random = np.random.default_rng(5)
    batch = Batch(session, None)
    finished: list[Row] = []
    lengths = random.permutation([*range(1, 20), 40, 45])
    waiting = [
        Row(tuple(map(int, random.integers(0, 256, size))), SETTINGS[number % 3])
        for number, size in enumerate(lengths)
    ]
    goals = {id(row): int(random.integers(1, 19)) for row in waiting}
    steps = 0
    while waiting or batch.rows:
        for _ in range(int(random.integers(0, 3))):
            if waiting and len(batch.rows) < 5:
                row = waiting.pop()
                cache = batch.prefill(row)
                batch.join(row, cache)
        for row in batch.rows:
            if len(row.ids) >= goals[id(row)]:
                batch.leave(row)
                finished.append(row)
        if batch.rows:
            batch.step()
            steps += 1
    assert len(finished) == len(lengths)
    assert steps < sum(goals.values())
    for row in finished:
        assert row.ids == alone(session, row, len(row.ids))


def test_rows_that_come_and_go_get_the_tokens_they_get_alone(session: ArtifactSession) -> None:
    come_and_go(session)


@pytest.mark.slow
def test_so_they_do_where_rows_begin_with_their_tokens(
    checkpoint: Callable[[str], Path], tmp_path: Path, captured_once: None
) -> None:
    from alloc_moe.compiler import api

    path = tmp_path / "out.onnx"
    api.compile(
        str(checkpoint("olmoe")),
        output=path,
        budget=0.5,
        device="cuda",
        redistribute="none",
        correct="none",
        tokens=256,
    )
    session = open_session(path, ep="cpu")
    assert session.pads_right
    come_and_go(session)


def test_experts_are_counted_for_the_row_they_ran_for(session: ArtifactSession) -> None:
    prompts = [(1, 2, 3), tuple(range(40, 60)), (7,)]
    rows = [Row(prompt, Sampling()) for prompt in prompts]
    batch = Batch(session, None)
    for row in rows:
        batch.join(row, batch.prefill(row))
        batch.step()
    for row in rows:
        single = Row(row.prompt_ids, Sampling())
        own = Batch(session, None)
        own.join(single, own.prefill(single))
        while len(single.ids) < len(row.ids):
            own.step()
        assert row.computed == len(row.prompt_ids) + len(row.ids) - 1 == single.computed
        assert row.executed is not None
        assert row.executed.tolist() == single.executed.tolist()  # type: ignore[union-attr]
        assert row.last_executed.tolist() == single.last_executed.tolist()  # type: ignore[union-attr]


def test_the_price_is_that_of_the_batch(session: ArtifactSession) -> None:
    row = Row((1, 2, 3), Sampling(), price=0.9)
    batch = Batch(session, 0.9)
    batch.join(row, batch.prefill(row))
    for _ in range(6):
        batch.step()
    assert row.ids == alone(session, row, 7)
    dear = row.executed
    cheap = Row((1, 2, 3), Sampling(), price=0.0)
    Batch(session, 0.0).prefill(cheap)
    assert dear is not None
    assert cheap.executed is not None
    assert dear.sum() / row.computed < cheap.executed.sum() / cheap.computed


def test_the_cache_does_not_grow_with_what_was_served(session: ArtifactSession) -> None:
    batch = Batch(session, None)
    before = None
    for number in range(40):
        row = Row((number, 1, 2), Sampling())
        batch.join(row, batch.prefill(row))
        for _ in range(5):
            batch.step()
        if before is not None:
            batch.leave(before)
        before = row
    assert batch._cache is not None
    assert batch._cache.capacity <= 64
    assert len(batch._places) <= 2


def test_gathered_rows_do_not_share_memory(session: ArtifactSession) -> None:
    cache = session.run([[1, 2, 3], [4, 5, 6]]).cache
    first = gather_rows(session, [(cache, 1)])
    second = gather_rows(session, [(cache, 1), (cache, 0)])
    once = session.run([[9]], cache=first).logits
    again = session.run([[9], [9]], cache=second).logits
    expected = session.run([[8], [9]], cache=cache).logits
    np.testing.assert_allclose(once[0], expected[1], atol=2e-4)
    np.testing.assert_allclose(again[0], expected[1], atol=2e-4)
