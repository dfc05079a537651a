"""Servers on a free port, in a thread of the tests' process."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from alloc_moe.runtime.serving.app import application
from alloc_moe.runtime.serving.server import Limits, Server
from alloc_moe.runtime.text.model import TextModel, load


class Running:
    """A server that runs: its model and its address."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.model, self.port = server, server.model, port
        self.url = f"http://127.0.0.1:{port}"

    def metric(self, name: str) -> int:
        """Return one of the metrics."""
        [line] = [
            line
            for line in self.server.metrics.text().splitlines()
            if line.startswith(f"alloc_moe_{name} ")
        ]
        return int(line.split()[-1])

    def wait_for(self, name: str, value: int) -> None:
        """Wait until a metric has a value."""
        end = time.monotonic() + 120
        while self.metric(name) != value and time.monotonic() < end:
            time.sleep(0.01)
        assert self.metric(name) == value


@contextlib.contextmanager
def _running(
    model: TextModel, *, key: str | None = None, hold: bool = False, **limits: Any
) -> Iterator[Running]:
    server = Server(model, name="toy", limits=Limits(**limits), key=key, hold=hold)
    config = uvicorn.Config(
        application(server, hosts=["127.0.0.1"]), log_config=None, timeout_graceful_shutdown=5
    )
    web = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Running(server, listener.getsockname()[1])
    finally:
        web.should_exit = True
        thread.join(timeout=120)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> TextModel:
    return load(chat_bundle, ep="cpu", count_activations=True)


@pytest.fixture(scope="module")
def served(model: TextModel) -> Iterator[Running]:
    """A server of the toy that chats and has a dial."""
    with _running(model, new_tokens=60) as server:
        yield server


@pytest.fixture
def running() -> Callable[..., Any]:
    """Return what runs a server of a model while a block does."""
    return _running


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Return what starts a server of a model with other limits; it ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(_running(model, **options))


@pytest.fixture
def slow(chat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> TextModel:
    """A model of its own whose every call takes a twentieth of a second."""
    model = load(chat_bundle, ep="cpu")
    run = model.session.run

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return run(*arguments, **options)

    monkeypatch.setattr(model.session, "run", slowly)
    return model


@pytest.fixture
def ask() -> Callable[..., tuple[int, Any, http.client.HTTPMessage]]:
    """Return what posts a body and returns status, JSON and headers."""
    return _ask


def _ask(
    port: int, path: str, body: Any, *, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Post a body, as JSON unless it is bytes; return status, JSON and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} if headers is None else headers
    connection.request("POST", path, data, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None, answer.headers
