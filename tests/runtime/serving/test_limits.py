"""Clients that hang up, crowds, time-outs, failures: rows and queue are free afterwards."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from alloc_moe.runtime.errors import ArtifactError
from alloc_moe.runtime.serving import batch
from alloc_moe.runtime.text.model import TextModel, load
from alloc_moe.runtime.text.sampling import Sampling

openai = pytest.importorskip("openai")

TALK = [{"role": "user", "content": "Héllo"}]
BASE = {"model": "toy", "prompt": "One", "temperature": 0}


def hang_up(server: Any, body: dict[str, Any], *, when: str) -> None:
    """Send a request, and close the connection when a metric is 1."""
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head.encode() + content)
        server.wait_for(when, 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(
    ask: Any, slow: TextModel, serve: Callable[..., Any], stream: bool
) -> None:
    server = serve(slow, rows=1)
    hang_up(server, {**BASE, "max_tokens": 50, "stream": stream}, when="running")
    server.wait_for("running", 0)
    assert server.metric("cancelled_total") == 1
    assert server.metric("generated_tokens_total") < 30
    assert ask(server.port, "/v1/completions", {**BASE, "max_tokens": 2})[0] == 200


def test_a_client_that_hangs_up_leaves_the_queue(
    ask: Any, slow: TextModel, serve: Callable[..., Any]
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


def test_overload_is_told_and_passes(ask: Any, slow: TextModel, serve: Callable[..., Any]) -> None:
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


def test_a_request_that_takes_too_long_is_ended(
    ask: Any, slow: TextModel, serve: Callable[..., Any]
) -> None:
    server = serve(slow, rows=1, seconds=0.4)
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "max_tokens": 50})
    assert status == 504
    assert "took longer than the server allows" in answer["error"]["message"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="took longer"):
        list(client.completions.create(model="toy", prompt="One", max_tokens=50, stream=True))
    client.close()
    server.wait_for("running", 0)


def test_the_end_waits_for_those_that_run(
    ask: Any, slow: TextModel, running: Callable[..., Any]
) -> None:
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
    ask: Any, slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
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


def test_a_batch_that_memory_does_not_suffice_for_fails_alone(
    ask: Any, slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError("unable to allocate")

    def fails(**fields: Any) -> bool:
        return bool(ask(server.port, "/v1/completions", {**BASE, **fields})[0] == 500)

    server = serve(slow, rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "gather_rows", no_memory)
        assert fails(max_tokens=5)  # that begins a batch
    with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(fails, max_tokens=50) for _ in range(2)]
        server.wait_for("running", 2)
        patch.setattr(slow.session, "run", no_memory)
        patch.setattr(batch, "gather_rows", no_memory)
        assert all(each.result() for each in asked)
    server.wait_for("running", 0)
    assert ask(server.port, "/v1/completions", {**BASE, "max_tokens": 2})[0] == 200


def test_what_onnxruntime_lacks_memory_for_fails_alone(
    ask: Any, slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise ort_errors.RuntimeException("Failed to allocate memory for requested buffer")

    server = serve(slow)
    with monkeypatch.context() as patch:
        patch.setattr(slow.session, "empty_cache", no_memory)
        assert ask(server.port, "/v1/completions", BASE)[0] == 500
    assert ask(server.port, "/v1/completions", BASE)[0] == 200


def test_a_row_that_is_no_number_fails_alone(
    ask: Any, slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slow.session.run

    def spoiling(ids: Any, **options: Any) -> Any:
        output = run(ids, **options)
        if len(ids) == 3:
            output.logits[1] = np.nan
        return output

    monkeypatch.setattr(slow.session, "run", spoiling)
    server = serve(slow, rows=3)
    body = {**BASE, "max_tokens": 40}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [
            each[0]
            for each in pool.map(lambda _: ask(server.port, "/v1/completions", body), range(3))
        ]
    assert sorted(found) == [200, 200, 500]
    assert server.server.scheduler.is_open


def test_what_is_no_number_reaches_nobody_else(model: TextModel) -> None:
    rows = [batch.Row((5, 6, 7, 8), Sampling()) for _ in range(3)]
    rows.append(batch.Row((9,), Sampling()))
    together, alone = (batch.Batch(model.session, None) for _ in range(2))
    for row in rows[:2]:
        together.join(row, together.prefill(row))
    cache = together._cache
    assert cache is not None
    for values in cache.arrays():
        values[1] = np.nan
    assert list(together.step()) == [rows[1]]
    for row, there in ((rows[3], together), (rows[2], alone)):
        there.join(row, there.prefill(row))
    for _ in range(3):
        assert together.step() == alone.step() == {}
    assert rows[0].ids[:4] == rows[2].ids


def test_more_answers_than_there_is_ever_room_for_are_refused(
    ask: Any, model: TextModel, serve: Callable[..., Any]
) -> None:
    server = serve(model, rows=1, waiting=1)
    status, answer, _ = ask(server.port, "/v1/completions", {**BASE, "n": 3})
    assert status == 400
    assert "3 answers were asked for at once; this server has room for 2" in str(answer)
    assert ask(server.port, "/v1/completions", {**BASE, "n": 2})[0] == 200


def test_what_a_bug_ends_is_counted_too(
    ask: Any, model: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    monkeypatch.setattr(server.server.scheduler, "submit", lambda _: 1 / 0)
    assert ask(server.port, "/v1/completions", BASE)[0] == 500
    assert 'alloc_moe_requests_total{status="500"} 1' in server.server.metrics.text()


def test_a_bug_ends_all_requests_and_shows_in_health(
    ask: Any, slow: TextModel, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(slow.session, "run", broken)
    server = serve(slow)
    assert ask(server.port, "/v1/completions", BASE)[0] == 500
    assert ask(server.port, "/v1/completions", BASE)[0] == 503
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 503
    connection.close()


def test_metrics_are_what_happened(ask: Any, model: TextModel, serve: Callable[..., Any]) -> None:
    server = serve(model)
    ask(server.port, "/v1/completions", {**BASE, "max_tokens": 4, "temperature": 0})
    ask(server.port, "/v1/completions", {})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
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


def test_a_broken_template_is_no_clients_fault(
    ask: Any, chat_bundle: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    server = serve(load(chat_bundle, ep="cpu", chat_template=broken))
    status, answer, _ = ask(server.port, "/v1/chat/completions", {"model": "toy", "messages": TALK})
    assert status == 500
    assert answer["error"]["message"] == "The server can't run the model. Its log says why."


def test_where_tokens_compete_one_answer_is_written_at_a_time(
    ask: Any,
    make_toy: Callable[..., Path],
    plan: Any,
    chat_bundle: Path,
    tmp_path: Path,
    serve: Callable[..., Any],
) -> None:
    competing = dataclasses.replace(plan, redistribution="batch").to_json()
    toy = make_toy(tmp_path / "toy.onnx", plan=competing)
    model = load(toy, tokenizer=chat_bundle, ep="cpu")
    server = serve(model)
    body = {**BASE, "max_tokens": 8}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ask(server.port, "/v1/completions", body), range(8)))
    [expected] = model.generate(["One"], max_new_tokens=8)
    assert [answer["choices"][0]["text"] for _, answer, _ in found] == [expected.text] * 8
    assert server.metric("steps_total") == server.metric("step_rows_total") == 8 * 7
