"""alloc-serve as a process: what it says, how it ends, what it refuses."""

from __future__ import annotations

import builtins
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from alloc_moe.runtime.commands.alloc_serve import serve_command

CODE = "from alloc_moe.runtime.commands.alloc_serve import serve_command; serve_command()"
BODY = {"model": "toy", "prompt": "One", "temperature": 0, "max_tokens": 3}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts the command on a free port."""
    started = []

    def run(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CODE, "--port", "0", "--ep", "cpu", "--json"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout is not None
    url = urllib.parse.urlsplit(json.loads(process.stdout.readline())["url"])
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


def status(where: tuple[str, int], headers: dict[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection(*where, timeout=120)
    sent = {"content-type": "application/json", **(headers or {})}
    connection.request("POST", "/v1/completions", json.dumps(BODY), sent)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_this_machine_alone_until_it_is_stopped(
    start: Callable[..., subprocess.Popen[str]], chat_bundle: Path, end: signal.Signals
) -> None:
    process = start(chat_bundle, "--name", "toy")
    host, port = address(process)
    assert host == "127.0.0.1"
    assert status((host, port)) == 200
    assert status((host, port), {"host": "evil.example"}) == 400
    process.send_signal(end)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors.endswith("Stopped.\n")
    assert "Traceback" not in errors
    assert "Warning" not in errors


def test_the_key_comes_from_the_environment(
    start: Callable[..., subprocess.Popen[str]], chat_bundle: Path
) -> None:
    process = start(chat_bundle, "--name", "toy", ALLOC_MOE_API_KEY="secret")
    where = address(process)
    assert status(where) == 401
    assert status(where, {"authorization": "Bearer secret"}) == 200


def test_an_open_address_without_a_key_is_warned_of(
    start: Callable[..., subprocess.Popen[str]], chat_bundle: Path
) -> None:
    process = start(chat_bundle, "--name", "toy", "--host", "0.0.0.0")
    where = address(process)
    assert status(("127.0.0.1", where[1]), {"host": "my.example"}) == 200
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert "Warning: No key is asked for (ALLOC_MOE_API_KEY), so all who reach 0.0.0.0" in errors


def test_a_port_that_is_taken_is_said(chat_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        outcome = CliRunner().invoke(serve_command, [str(chat_bundle), "--port", port])
    assert outcome.exit_code == 1
    assert f"Nothing can listen at 127.0.0.1 port {port}:" in outcome.stderr
    assert "Give another --host or --port" in outcome.stderr


def test_an_artifact_that_is_not_there_is_said(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(serve_command, [str(tmp_path), "--port", "0", "--ep", "cpu"])
    assert outcome.exit_code == 1
    assert "has no model.onnx" in outcome.stderr


def test_a_template_that_is_not_there_is_said_before_anybody_asks(
    chat_bundle: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "none.jinja")
    arguments = [str(chat_bundle), "--port", "0", "--ep", "cpu", "--chat-template", missing]
    outcome = CliRunner().invoke(serve_command, arguments)
    assert outcome.exit_code == 1
    assert "The chat template" in outcome.stderr


@pytest.mark.parametrize("key", ["", " a", "schlüssel"])
def test_keys_that_no_client_can_send_are_refused(chat_bundle: Path, key: str) -> None:
    outcome = CliRunner().invoke(serve_command, [str(chat_bundle), "--api-key", key])
    assert outcome.exit_code == 2
    assert "The key must be ASCII text" in outcome.stderr


def test_a_missing_extra_is_said(chat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "uvicorn":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    outcome = CliRunner().invoke(serve_command, [str(chat_bundle)])
    assert outcome.exit_code == 1
    assert "Install alloc-moe[serve]" in outcome.stderr


def test_answers_are_written_one_at_a_time_where_tokens_compete(
    start: Callable[..., subprocess.Popen[str]],
    make_toy: Callable[..., Path],
    tmp_path: Path,
    chat_bundle: Path,
    plan: Any,
) -> None:
    import dataclasses

    competing = dataclasses.replace(plan, redistribution="batch").to_json()
    toy = make_toy(tmp_path / "toy.onnx", plan=competing)
    process = start(toy, "--tokenizer", chat_bundle / "tokenizer.json")
    where = address(process)
    assert status(where) == 200
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert "Answers are written one at a time: in this artifact, tokens compete." in errors
    assert "The model has no chat template, so it only continues texts." in errors
