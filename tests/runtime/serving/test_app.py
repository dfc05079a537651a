"""The server, through the client that people use and through none."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest

from alloc_moe.runtime.text.model import TextModel
from alloc_moe.runtime.text.sampling import Sampling

openai = pytest.importorskip("openai")

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo"}]


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_as_by_generate(client: Any, model: TextModel) -> None:
    [expected] = model.generate(messages=TALK, max_new_tokens=9)
    answer = client.chat.completions.create(
        model="toy", messages=TALK, temperature=0, max_completion_tokens=9
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == 9


def test_a_stream_gives_the_same_in_pieces_and_the_experts_that_ran(
    client: Any, model: TextModel
) -> None:
    [expected] = model.generate(messages=TALK, max_new_tokens=9)
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=TALK,
            temperature=0,
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"experts": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected.text
    assert len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 9
    first = chunks[0].alloc_moe["experts_per_layer"]
    assert len(first) == len(model.session.plan.layers)
    report = chunks[-1].alloc_moe
    assert report["experts_per_token"] == pytest.approx(sum(report["experts_per_layer"]), abs=1e-3)
    assert 2 <= report["experts_per_token"] <= 4


def test_the_budget_of_a_request_turns_the_dial(client: Any, model: TextModel) -> None:
    experts = {}
    for budget in (3, "0.5", 1.0):
        [expected] = model.generate(["The committee"], max_new_tokens=20, budget=budget)
        answer = client.completions.create(
            model="toy",
            prompt="The committee",
            temperature=0,
            max_tokens=20,
            extra_body={"budget": budget},
        )
        assert answer.choices[0].text == expected.text
        assert answer.alloc_moe["budget"] == budget
        experts[budget] = answer.alloc_moe["experts_per_token"]
    assert experts[3] < experts[1.0]


def test_requests_of_many_settings_at_once_get_what_they_get_alone(
    served: Any, client: Any, model: TextModel
) -> None:
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.3, "seed": 5, "top_p": 0.9},
        {"temperature": 1.0, "seed": 6, "min_p": 0.1, "repetition_penalty": 1.2},
    ]
    cases = [
        (
            f"Prompt {'x' * (number % 7)} {number}",
            settings[number % 3],
            (None, 0.5, 1.0)[number % 4 % 3],
        )
        for number in range(48)
    ]

    def answered(case: tuple[str, dict[str, Any], float | None]) -> str:
        prompt, options, budget = case
        own = {k: v for k, v in options.items() if k in ("min_p", "repetition_penalty")}
        known = {k: v for k, v in options.items() if k not in own}
        own |= {} if budget is None else {"budget": budget}
        answer = client.completions.create(
            model="toy", prompt=prompt, max_tokens=5 + len(prompt), extra_body=own, **known
        )
        return str(answer.choices[0].text)

    steps = served.metric("steps_total")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(answered, cases))
    for (prompt, options, budget), text in zip(cases, found, strict=True):
        [expected] = model.generate(
            [prompt], max_new_tokens=5 + len(prompt), sampling=Sampling(**options), budget=budget
        )
        assert text == expected.text
    # They did share calls of the model.
    assert served.metric("steps_total") - steps < sum(4 + len(prompt) for prompt, *_ in cases) / 2


def test_several_prompts_and_answers(client: Any, model: TextModel) -> None:
    sampling = Sampling(temperature=1.5, seed=3)
    expected = model.generate(["One", "One", "Two", "Two"], max_new_tokens=6, sampling=sampling)
    answer = client.completions.create(
        model="toy", prompt=["One", "Two"], n=2, temperature=1.5, seed=3, max_tokens=6
    )
    assert [choice.text for choice in answer.choices] == [each.text for each in expected]
    assert answer.usage.prompt_tokens == 6
    ids = client.completions.create(
        model="toy", prompt=list(b"One"), temperature=1.5, seed=3, max_tokens=6
    )
    assert ids.choices[0].text == expected[0].text


def test_stop_strings_end_an_answer(client: Any, model: TextModel) -> None:
    [free] = model.generate(["The committee"], max_new_tokens=30)
    stop = free.text[7:9]
    answer = client.completions.create(
        model="toy", prompt="The committee", temperature=0, max_tokens=30, stop=[stop]
    )
    assert answer.choices[0].text == free.text.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30


def test_a_chat_without_a_limit_takes_what_the_context_has(client: Any, model: TextModel) -> None:
    answer = client.chat.completions.create(model="toy", messages=TALK, temperature=0)
    assert answer.usage.total_tokens <= (model.session.context_length or 0)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_messages_may_come_in_parts(client: Any, model: TextModel) -> None:
    parts = [{"type": "text", "text": "Hé"}, {"type": "text", "text": "llo"}]
    answer = client.chat.completions.create(
        model="toy",
        messages=[TALK[0], {"role": "user", "content": parts}],
        temperature=0,
        max_tokens=5,
    )
    assert answer.choices[0].message.content == (
        model.generate(messages=TALK, max_new_tokens=5)[0].text
    )


def test_the_model_says_what_it_can(client: Any) -> None:
    [described] = client.models.list().data
    assert described.id == "toy"
    assert described.alloc_moe["chat"] is True
    assert described.alloc_moe["least"] == 2.5
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="Ask for 'toy'"):
        client.models.retrieve("other")
