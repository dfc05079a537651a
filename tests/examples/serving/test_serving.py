"""The server's examples, asked a few times only."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def artifact(toy_artifact: ModuleType, tmp_path: Path) -> Path:
    """A toy with its tokenizer beside it."""
    pytest.importorskip("openai")
    toy_artifact.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    path: Path = toy_artifact.write_toy(tmp_path / "out.onnx", dial=True, shared=True, keeps=True)
    return path


@pytest.fixture
def ask(
    load: Callable[[str], ModuleType], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], ModuleType]:
    """Return what prepares the script to ask a server of the toy so many times."""
    example = load("serving/load")
    questions = example.questions
    monkeypatch.setattr(
        example, "questions", lambda count: questions(count, most_characters=40, most_new=12)
    )

    def prepared(count: int) -> ModuleType:
        monkeypatch.setattr(sys, "argv", ["load.py", str(artifact), "--requests", str(count)])
        return example

    return prepared


def test_many_requests_get_what_generate_gives_them(
    ask: Callable[[int], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ask(40).main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "40 requests by 16 clients, 0 not as `generate` alone" in printed
    assert re.search(r"after each quarter: \[\d+, \d+, \d+, \d+\]", printed)


def test_a_wrong_answer_is_counted(
    ask: Callable[[int], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = ask(4)
    monkeypatch.setattr(example, "expected", lambda _, asked: ["nothing"] * len(asked))
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 1
    assert "4 not as" in capsys.readouterr().out


@pytest.mark.slow
def test_replicas_on_ray_serve_answer_alike(examples: Path, artifact: Path) -> None:
    pytest.importorskip("ray.serve", reason="needs pip install 'ray[serve]'", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, str(examples / "serving" / "ray_serve.py"), str(artifact)]
    done = subprocess.run(
        [*command, "--least", "2", "--try", "64", "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^64 answers from 2 replicas: \d+, \d+$", done.stdout, re.M)
