"""Generation of token ids: batches, padding, ends, limits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.execution.session import ArtifactSession, open_session
from alloc_moe.runtime.text.generation import generate, generate_steps
from alloc_moe.runtime.text.hold import held_budget
from alloc_moe.runtime.text.sampling import Sampling

PROMPTS = [[72, 101], [87, 111, 114, 108, 100, 33, 7], [1], [5, 6, 7, 8]]


@pytest.fixture(scope="module", params=["with position input", "without"])
def session(
    request: pytest.FixtureRequest, toy: Path, toy_without_positions: Path
) -> ArtifactSession:
    return open_session(toy if request.param == "with position input" else toy_without_positions)


def greedy_by_whole_calls(session: ArtifactSession, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens without a cache: the whole text is run for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(session.run(np.array([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_equal_those_without_a_cache(session: ArtifactSession) -> None:
    for prompt in PROMPTS:
        [tokens] = generate(session, [prompt], max_new_tokens=12)
        assert tokens == greedy_by_whole_calls(session, prompt, 12)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.0, seed=3)])
def test_a_batch_of_different_lengths_equals_each_alone(
    session: ArtifactSession, sampling: Sampling
) -> None:
    together = generate(session, PROMPTS, max_new_tokens=12, sampling=sampling)
    alone = [generate(session, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)  # the toy tells prompts apart


def test_sampled_rows_do_not_depend_on_their_batch_mates(session: ArtifactSession) -> None:
    sampling = Sampling(temperature=3.0, top_p=0.9, seed=11)
    two = generate(session, PROMPTS[:2], max_new_tokens=12, sampling=sampling)
    four = generate(session, PROMPTS, max_new_tokens=12, sampling=sampling)
    assert four[:2] == two
    assert two == generate(session, PROMPTS[:2], max_new_tokens=12, sampling=sampling)


def test_a_row_ends_with_eos_and_the_others_go_on_unchanged(session: ArtifactSession) -> None:
    free = generate(session, PROMPTS, max_new_tokens=10)
    eos = free[1][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert generate(session, PROMPTS, max_new_tokens=10, eos_ids={eos}) == expected
    assert len(expected[1]) == 4


def test_generation_stops_when_all_rows_have_ended(session: ArtifactSession) -> None:
    [free] = generate(session, PROMPTS[:1], max_new_tokens=10)
    steps = list(generate_steps(session, PROMPTS[:1], max_new_tokens=10, eos_ids={free[2]}))
    assert len(steps) == free.index(free[2]) + 1


def test_steps_have_none_for_ended_rows(session: ArtifactSession) -> None:
    free = generate(session, PROMPTS[:2], max_new_tokens=6)
    first = free[0][0]
    steps = list(generate_steps(session, PROMPTS[:2], max_new_tokens=6, eos_ids={first}))
    assert [step[0] for step in steps] == [first] + [None] * (len(steps) - 1)


def test_tokens_are_told_as_they_come(session: ArtifactSession) -> None:
    told: list[tuple[int, int]] = []
    rows = generate(
        session,
        PROMPTS[:2],
        max_new_tokens=3,
        on_token=lambda row, token: told.append((row, token)),
    )
    assert told == [(row, rows[row][step]) for step in range(3) for row in range(2)]


def test_eos_comes_from_the_models_configuration(
    bundle: Path, sizes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(bundle)
    free = generate(session, PROMPTS[:1], max_new_tokens=5)
    assert session.files.eos_ids() == {sizes.eos}
    monkeypatch.setattr(type(session.files), "eos_ids", lambda files: frozenset({free[0][1]}))
    assert generate(session, PROMPTS[:1], max_new_tokens=5) == [free[0][:2]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_holds_are_as_many_as_prompts(dial_bundle: Path, count: int) -> None:
    held = held_budget(open_session(dial_bundle, ep="cpu", count_activations=True), 3)
    session = open_session(dial_bundle, ep="cpu", count_activations=True)
    holds = [held.begin() for _ in range(count)]
    message = rf"{count} budgets are held for 2 prompts\. Give one hold for each"
    with pytest.raises(GenerationError, match=message):
        list(generate_steps(session, PROMPTS[:2], max_new_tokens=2, holds=holds))


def test_no_prompts_give_no_rows(session: ArtifactSession) -> None:
    assert generate(session, [], max_new_tokens=5) == []


def test_the_context_length_is_a_limit_for_prompt_and_answer(
    bundle: Path, sizes: SimpleNamespace
) -> None:
    session = open_session(bundle)
    prompt = [1] * (sizes.context - 4)
    assert len(generate(session, [prompt], max_new_tokens=4, eos_ids=())[0]) == 4
    message = rf"Prompt 2 has {len(prompt)} tokens and 5 new ones.*holds {sizes.context} in all"
    with pytest.raises(GenerationError, match=message):
        generate(session, [[1], prompt], max_new_tokens=5)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 5, "Prompt 2 has no tokens"),
        ([[1]], 0, "0 new tokens were asked for"),
        ([[1, 257]], 5, "Prompt 1 has a token id outside 0 to 256"),
        ([[-1]], 5, "outside 0 to 256"),
    ],
)
def test_what_the_model_cannot_take_is_reported(
    session: ArtifactSession, prompts: list[list[int]], count: int, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(session, prompts, max_new_tokens=count)
