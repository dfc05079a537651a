"""Other runtimes open a bundle unchanged and generate the same tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alloc_moe.compiler import api
from alloc_moe.runtime.text.model import load

CLIENTS = Path(__file__).parents[3] / "examples" / "clients"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ASKED = "The committee, été"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def bundle(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small model that is told how to chat."""
    model = shutil.copytree(checkpoint("olmoe"), tmp_path_factory.mktemp("model") / "olmoe")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    folder = tmp_path_factory.mktemp("clients") / "bundle"
    api.compile(str(model), output=f"{folder}/", budget=0.5, tokens=256, correct="none")
    return folder


@pytest.fixture(scope="module", params=["generate.mjs", "generate_genai.py"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """What runs a client, if what it needs is there."""
    if request.param.endswith(".py"):
        pytest.importorskip("onnxruntime_genai")
        return [sys.executable, str(CLIENTS / request.param)]
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules").is_dir():
        pytest.skip("needs Node.js, and npm install --ignore-scripts in examples/clients")
    return [node, str(CLIENTS / request.param)]


def run(command: list[str], bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    whole = [*command, str(bundle), *options, "--max-new-tokens", str(NEW_TOKENS)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", ["prompt", "message"])
def test_tokens_equal_those_of_the_runtime(command: list[str], bundle: Path, kind: str) -> None:
    model = load(bundle, ep="cpu")
    asked = [{"role": "user", "content": ASKED}]
    [expected] = (
        model.generate([ASKED], max_new_tokens=NEW_TOKENS)
        if kind == "prompt"
        else model.generate(messages=asked, max_new_tokens=NEW_TOKENS)
    )
    done = run(command, bundle, f"--{kind}", ASKED, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompt_ids"] == list(expected.prompt_ids)
    assert found["ids"] == list(expected.ids)
    told = run(command, bundle, f"--{kind}", ASKED).stdout
    if "\ufffd" not in expected.text:  # which each tokenizer decodes in its own way
        assert told == f"{expected.text}\n"


def test_a_bundle_without_a_template_cannot_be_asked(
    command: list[str], bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    done = run(command, copy, "--message", ASKED)
    assert done.returncode == 1
    assert "has no chat template" in done.stderr
