"""Whatever a body holds, it is something to compute or one refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.runtime.serving.protocol import Asked, RequestError, chat_asked, completion_asked
from alloc_moe.runtime.text.model import TextModel

FUZZ = settings.get_profile("fuzz")
MANY = settings(FUZZ, max_examples=max(300, FUZZ.max_examples))

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
FIELDS = (
    *("prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "min_p"),
    *("repetition_penalty", "seed", "stop", "stream", "stream_options", "n", "budget", "experts"),
    *("logprobs", "logit_bias", "echo", "tools", "user", "response_format", "nonsense"),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | JSON, "content": JSON}),
    max_size=3,
)


def outcome(read: Callable[..., Asked], body: bytes, model: TextModel) -> Asked | RequestError:
    try:
        return read(body, model, "toy", most_new=30)
    except RequestError as error:
        return error


@MANY
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    messages=MESSAGES | JSON,
    prompt=st.text(min_size=1, max_size=9) | JSON,
)
def test_any_body_is_asked_or_refused(
    model: TextModel, fields: dict[str, Any], messages: Any, prompt: Any
) -> None:
    for read, own in (
        (completion_asked, {"prompt": prompt}),
        (chat_asked, {"messages": messages}),
    ):
        body = json.dumps({"model": "toy", **own, **fields}).encode()
        asked = outcome(read, body, model)
        if isinstance(asked, RequestError):
            assert 400 <= asked.status < 500
            assert 0 < len(str(asked)) < 700
            continue
        assert 1 <= len(asked.choices) <= 16
        assert all(0 < choice.max_new_tokens <= 30 for choice in asked.choices)


@MANY
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(model: TextModel, body: bytes) -> None:
    with pytest.raises(RequestError):
        completion_asked(body, model, "toy", most_new=30)


def test_what_a_field_leaves_out_is_the_default(model: TextModel) -> None:
    body = json.dumps({"model": "toy", "prompt": "One", "temperature": None, "n": None}).encode()
    asked = completion_asked(body, model, "toy", most_new=30)
    [choice] = asked.choices
    assert choice.max_new_tokens == 16
    assert choice.row.sampling.temperature == 1
    assert choice.row.price is None
    assert not asked.stream
    # Drawn, and small enough for what reads JSON's numbers as floats.
    assert 0 <= asked.seed < 2**32


def test_what_keeps_fewer_tokens_is_nothing_to_a_greedy_choice(model: TextModel) -> None:
    fields = {"model": "toy", "prompt": "One", "temperature": 0, "top_p": 0.9, "min_p": 0.1}
    [choice] = completion_asked(json.dumps(fields).encode(), model, "toy", most_new=30).choices
    assert (choice.row.sampling.top_p, choice.row.sampling.min_p) == (1, 0)
