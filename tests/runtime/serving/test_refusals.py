"""What the server refuses, and what it says then."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.runtime.text.model import TextModel, load

openai = pytest.importorskip("openai")

TALK = [{"role": "user", "content": "Héllo"}]
BASE = {"model": "toy", "prompt": "One", "temperature": 0}
MALFORMED = [
    (b"{", 400, "it is no JSON"),
    (b"[" * 100_000, 400, "nested too deeply"),
    (b"[]", 400, "it is no JSON object"),
    (b"\xff\xfe{}", 400, "it is no JSON"),
    (b'{"model": "toy", "prompt": "One", "temperature": NaN}', 400, "temperature is NaN"),
    (b'{"model": "toy", "prompt": "One", "temperature": 1e999}', 400, "temperature is Infinity"),
    (b'{"model": "toy", "prompt": "One", "seed": ' + b"9" * 5000 + b"}", 400, "no JSON: Exceeds"),
    ({"prompt": "One"}, 400, "it lacks model"),
    ({"model": "toy"}, 400, "it lacks prompt"),
    ({**BASE, "model": "other"}, 404, "There is no model 'other' here. Ask for 'toy'"),
    ({**BASE, "prompt": ""}, 400, "Prompt 1 has no tokens"),
    ({**BASE, "prompt": []}, 400, "prompt is a list of 0 items"),
    ({**BASE, "prompt": [5, "a"]}, 400, "prompt[1] is 'a', where a whole number"),
    ({**BASE, "prompt": [300]}, 400, "a token id outside 0 to 256"),
    ({**BASE, "prompt": [-1]}, 400, "prompt[0] is -1, where a whole number from 0"),
    ({**BASE, "prompt": "\ud800"}, 400, "or a text of at most"),
    ({**BASE, "prompt": "x" * 70}, 400, "the model's context holds 64"),
    ({**BASE, "max_tokens": 61}, 400, "61 new tokens were asked for; here 60 are the most"),
    ({**BASE, "max_tokens": 0}, 400, "max_tokens is 0"),
    ({**BASE, "max_tokens": True}, 400, "max_tokens is true"),
    ({**BASE, "max_tokens": 10**40}, 400, "max_tokens is a number of about 40 digits"),
    ({**BASE, "temperature": -1}, 400, "temperature is -1"),
    ({**BASE, "temperature": 1, "top_p": 0}, 400, "top-p is 0"),
    ({**BASE, "n": 17}, 400, "n is 17"),
    ({**BASE, "prompt": ["a"] * 9, "n": 2}, 400, "9 prompts with 2 answers each"),
    ({**BASE, "stop": ["a"] * 17}, 400, "stop is a list of 17 items, where a list of 0 to"),
    ({**BASE, "stop": ""}, 400, "'' is no stop string"),
    ({**BASE, "budget": -1}, 400, "budget is -1, where a number from 0 to 1000000000.0 or a text"),
    ({**BASE, "budget": True}, 400, "budget is true, where a number from 0"),
    ({**BASE, "budget": 0.01}, 400, "below the artifact's dial"),
    ({**BASE, "budget": "lots"}, 400, "'lots' is no positive number"),
    ({**BASE, "budget": 9}, 400, "above the artifact's dial"),
    ({**BASE, "logprobs": 3}, 400, "logprobs isn't supported here"),
    ({**BASE, "frequency_penalty": 0.5}, 400, "frequency_penalty isn't supported here"),
    ({**BASE, "nonsense\x1b[31m": 1}, 400, "unknown field nonsense"),
]


@pytest.mark.parametrize(("body", "status", "message"), MALFORMED, ids=lambda v: str(v)[:40])
def test_malformed_requests_are_refused_with_a_reason(
    ask: Any, served: Any, body: Any, status: int, message: str
) -> None:
    found, answer, _ = ask(served.port, "/v1/completions", body)
    assert found == status
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 600
    assert "\x1b" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is a list of 0 items"),
        ([{"role": "user"}], "it lacks messages[0].content"),
        ([{"role": "tool", "content": "a"}], "there is no role tool"),
        (
            [{"role": "user", "content": 5}],
            "content is 5, where a list of 1 to 256 items or a text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "it lacks messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "unknown field messages[0].content[0].image_url",
        ),
        ([{"role": "user", "content": "a", "tool_calls": []}], "unknown field messages[0].tool_c"),
    ],
)
def test_malformed_messages_are_refused(ask: Any, served: Any, messages: Any, message: str) -> None:
    body = {"model": "toy", "messages": messages}
    status, answer, _ = ask(served.port, "/v1/chat/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_what_is_not_json_is_not_read(ask: Any, served: Any) -> None:
    headers = {"content-type": "text/plain"}  # a page elsewhere could send that unasked
    assert ask(served.port, "/v1/completions", BASE, headers=headers)[0] == 415
    assert ask(served.port, "/v1/completions", b" " * (4 << 20) + b"{}")[0] == 413


def test_names_that_lead_here_by_a_trick_are_refused(served: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    connection.request("GET", "/v1/models", headers={"host": "evil.example"})
    assert connection.getresponse().status == 400
    connection.close()


def test_other_routes_and_methods_are_refused(ask: Any, served: Any) -> None:
    assert ask(served.port, "/v1/embeddings", {})[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    connection.request("GET", "/v1/completions")
    answer = connection.getresponse()
    assert answer.status == 405
    assert json.loads(answer.read())["error"]["message"] == "Method Not Allowed"
    connection.close()


def test_a_model_that_cannot_chat_says_so(
    ask: Any, bundle: Path, serve: Callable[..., Any]
) -> None:
    server = serve(load(bundle, ep="cpu"))
    body = {"model": "toy", "messages": TALK}
    status, answer, _ = ask(server.port, "/v1/chat/completions", body)
    assert status == 400
    assert "has no chat template: as far as it says, it continues" in answer["error"]["message"]
    assert str(bundle) not in answer["error"]["message"]
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "budget": 0.5})
    assert status == 400
    assert "its plan has no dial" in answer["error"]["message"]


def test_a_key_is_asked_for(ask: Any, model: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(model, key="secret")
    for given, status in (("secret", 200), ("secrets", 401), ("", 401), ("geheim\xe9", 401)):
        headers = {"content-type": "application/json", "authorization": f"Bearer {given}"}
        assert ask(server.port, "/v1/completions", BASE, headers=headers)[0] == status
    assert ask(server.port, "/v1/completions", BASE)[0] == 401
    with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").models.list()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401)):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()
