"""The server, through the client that people use and through none."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.text.model import TextModel, load
from alloc_moe.runtime.text.sampling import Sampling

openai = pytest.importorskip("openai")

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo"}]


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(
    port: int, path: str, body: Any, *, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Post a body, as JSON unless it is bytes; return status, JSON and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} if headers is None else headers
    connection.request("POST", path, data, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None, answer.headers


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
    ({**BASE, "prompt": [5, "a"]}, 400, "prompt is a list of 2 items"),
    ({**BASE, "prompt": [300]}, 400, "a token id outside 0 to 256"),
    ({**BASE, "prompt": [-1]}, 400, "prompt is a list of 1 items"),
    ({**BASE, "prompt": "\ud800"}, 400, "where a text of at most"),
    ({**BASE, "prompt": "x" * 70}, 400, "the model's context holds 64"),
    ({**BASE, "max_tokens": 61}, 400, "61 new tokens were asked for; here 60 are the most"),
    ({**BASE, "max_tokens": 0}, 400, "max_tokens is 0"),
    ({**BASE, "max_tokens": True}, 400, "max_tokens is true"),
    ({**BASE, "max_tokens": 10**40}, 400, "max_tokens is a number of about 40 digits"),
    ({**BASE, "temperature": -1}, 400, "temperature is -1"),
    ({**BASE, "temperature": 1, "top_p": 0}, 400, "top-p is 0"),
    ({**BASE, "n": 17}, 400, "n is 17"),
    ({**BASE, "prompt": ["a"] * 9, "n": 2}, 400, "9 prompts with 2 answers each"),
    ({**BASE, "stop": ["a"] * 17}, 400, "stop is a list of 17 items"),
    ({**BASE, "stop": ""}, 400, "'' is no stop string"),
    ({**BASE, "budget": 0.01}, 400, "below the artifact's dial"),
    ({**BASE, "budget": "lots"}, 400, "'lots' is no positive number"),
    ({**BASE, "budget": 9}, 400, "above the artifact's dial"),
    ({**BASE, "logprobs": 3}, 400, "logprobs isn't supported here"),
    ({**BASE, "frequency_penalty": 0.5}, 400, "frequency_penalty isn't supported here"),
    ({**BASE, "nonsense\x1b[31m": 1}, 400, "unknown field nonsense"),
]


@pytest.mark.parametrize(("body", "status", "message"), MALFORMED, ids=lambda v: str(v)[:40])
def test_malformed_requests_are_refused_with_a_reason(
    served: Any, body: Any, status: int, message: str
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
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content is a list"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "unknown field messages[0].tool_c"),
    ],
)
def test_malformed_messages_are_refused(served: Any, messages: Any, message: str) -> None:
    body = {"model": "toy", "messages": messages}
    status, answer, _ = ask(served.port, "/v1/chat/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_what_is_not_json_is_not_read(served: Any) -> None:
    headers = {"content-type": "text/plain"}  # a page elsewhere could send that unasked
    assert ask(served.port, "/v1/completions", BASE, headers=headers)[0] == 415
    assert ask(served.port, "/v1/completions", b" " * (4 << 20) + b"{}")[0] == 413


def test_names_that_lead_here_by_a_trick_are_refused(served: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("GET", "/v1/models", headers={"host": "evil.example"})
    assert connection.getresponse().status == 400
    connection.close()


def test_other_routes_and_methods_are_refused(served: Any) -> None:
    assert ask(served.port, "/v1/embeddings", {})[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("GET", "/v1/completions")
    answer = connection.getresponse()
    assert answer.status == 405
    assert json.loads(answer.read())["error"]["message"] == "Method Not Allowed"
    connection.close()


def test_a_model_that_cannot_chat_says_so(bundle: Path, serve: Callable[..., Any]) -> None:
    server = serve(load(bundle, ep="cpu"))
    body = {"model": "toy", "messages": TALK}
    status, answer, _ = ask(server.port, "/v1/chat/completions", body)
    assert status == 400
    assert "has no chat template: as far as it says, it continues" in answer["error"]["message"]
    assert str(bundle) not in answer["error"]["message"]
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "budget": 0.5})
    assert status == 400
    assert "its plan has no dial" in answer["error"]["message"]


def test_a_key_is_asked_for(model: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(model, key="secret")
    for given, status in (("secret", 200), ("secrets", 401), ("", 401), ("geheim\xe9", 401)):
        headers = {"content-type": "application/json", "authorization": f"Bearer {given}"}
        assert ask(server.port, "/v1/completions", BASE, headers=headers)[0] == status
    assert ask(server.port, "/v1/completions", BASE)[0] == 401
    with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").models.list()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401)):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()


def hang_up(server: Any, body: dict[str, Any], *, when: str) -> None:
    """Send a request, and close the connection when a metric is 1."""
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        server.wait_for(when, 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(
    slow: TextModel, serve: Callable[..., Any], stream: bool
) -> None:
    server = serve(slow, rows=1)
    hang_up(server, {**BASE, "max_tokens": 50, "stream": stream}, when="running")
    server.wait_for("running", 0)
    assert server.metric("cancelled_total") == 1
    assert server.metric("generated_tokens_total") < 30
    assert ask(server.port, "/v1/completions", {**BASE, "max_tokens": 2})[0] == 200


def test_a_client_that_hangs_up_leaves_the_queue(
    slow: TextModel, serve: Callable[..., Any]
) -> None:
    server = serve(slow, rows=1)
    busy = threading.Thread(
        target=ask, args=(server.port, "/v1/completions", {**BASE, "max_tokens": 20})
    )
    busy.start()
    server.wait_for("running", 1)
    hang_up(server, {**BASE, "max_tokens": 50}, when="waiting")
    server.wait_for("waiting", 0)
    busy.join()
    assert server.metric("generated_tokens_total") == 20


def test_overload_is_told_and_passes(slow: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(slow, rows=1, waiting=1)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        body = {**BASE, "max_tokens": 10}
        found = list(pool.map(lambda _: ask(server.port, "/v1/completions", body), range(6)))
    statuses = sorted(status for status, _, _ in found)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    assert set(statuses) == {200, 429}
    [(_, answer, headers), *_] = [each for each in found if each[0] == 429]
    assert (
        "The server is busy: 2 answers are being written or wait, of at most 2"
        in answer["error"]["message"]
    )
    assert headers["retry-after"] == "1"
    assert ask(server.port, "/v1/completions", body)[0] == 200


def test_a_request_that_takes_too_long_is_ended(slow: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(slow, rows=1, seconds=0.4)
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "max_tokens": 50})
    assert status == 504
    assert "took longer than the server allows" in answer["error"]["message"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="took longer"):
        list(client.completions.create(model="toy", prompt="One", max_tokens=50, stream=True))
    client.close()
    server.wait_for("running", 0)


def test_the_end_waits_for_those_that_run(slow: TextModel, running: Callable[..., Any]) -> None:
    found: list[int] = []
    body = {**BASE, "max_tokens": 20, "temperature": 0}
    with running(slow, rows=1) as server:
        thread = threading.Thread(
            target=lambda: found.append(ask(server.port, "/v1/completions", body)[0])
        )
        thread.start()
        server.wait_for("running", 1)
    thread.join()
    assert found == [200]
    assert server.metric("generated_tokens_total") == 20
    assert not server.server.scheduler.is_open


def test_a_failure_of_the_model_is_told_without_its_words(
    slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slow.session.run

    def failing(ids: Any, **options: Any) -> Any:
        if ids[0][0] == ord("X") and options["cache"].length == 0:
            raise ArtifactError("/secret/path can't be run")
        return run(ids, **options)

    monkeypatch.setattr(slow.session, "run", failing)
    server = serve(slow)
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "prompt": "X"})
    assert (status, answer["error"]["message"]) == (
        500,
        "The server can't run the model. Its log says why.",
    )
    assert ask(server.port, "/v1/completions", BASE)[0] == 200


def test_a_bug_ends_all_requests_and_shows_in_health(
    slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(slow.session, "run", broken)
    server = serve(slow)
    assert ask(server.port, "/v1/completions", BASE)[0] == 500
    assert ask(server.port, "/v1/completions", BASE)[0] == 503
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 503
    connection.close()


def test_metrics_are_what_happened(model: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(model)
    ask(server.port, "/v1/completions", {**BASE, "max_tokens": 4, "temperature": 0})
    ask(server.port, "/v1/completions", {})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert found['alloc_moe_requests_total{status="200"}'] == "1"
    assert found['alloc_moe_requests_total{status="400"}'] == "1"
    assert found["alloc_moe_generated_tokens_total"] == "4"
    assert found["alloc_moe_prompt_tokens_total"] == "3"
    assert found["alloc_moe_steps_total"] == found["alloc_moe_step_rows_total"] == "3"
    assert 6 * 2 <= int(found["alloc_moe_executed_experts_total"]) <= 6 * 4
