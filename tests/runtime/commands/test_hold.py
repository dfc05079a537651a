"""--hold in the commands of the base install."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from alloc_moe.runtime.artifact.plan import MODEL_FILE, PADDING_KEY
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.commands.alloc_serve import serve_command
from alloc_moe.runtime.errors import GenerationError
from alloc_moe.runtime.text.hold import held_budget
from alloc_moe.runtime.text.model import load

PROMPT = ("--prompt", "The committee", "--max-new-tokens", "20", "--ep", "cpu")


def invoke(command: Any, *arguments: object, typed: str = "") -> Any:
    return CliRunner().invoke(command, [*map(str, arguments)], input=typed)


def test_a_text_is_continued_on_a_held_budget(dial_bundle: Path) -> None:
    outcome = invoke(run_command, dial_bundle, *PROMPT, "--hold", "--budget", "3", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    [completion] = json.loads(outcome.stdout)["completions"]
    model = load(dial_bundle, ep="cpu", count_activations=True)
    [expected] = model.generate(["The committee"], max_new_tokens=20, budget=3, hold=True)
    assert completion["text"] == expected.text
    assert completion["experts_per_token"] == expected.experts_per_token
    assert f"Experts executed per token: {expected.experts_per_token:.4g}." in outcome.stderr
    plain = model.generate(["The committee"], max_new_tokens=20, budget=3)
    assert plain[0].experts_per_token is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "b"), "takes one price per call, so 2 sequences can't have prices of their"),
        (("--budget", "0.1"), "below the artifact's dial"),
    ],
)
def test_what_cannot_be_held_is_one_sentence(
    dial_bundle: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = invoke(run_command, dial_bundle, *PROMPT, "--hold", *options)
    assert outcome.exit_code == 1
    assert message in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (run_command, PROMPT),
        (bench_command, ("--ep", "cpu")),
        (serve_command, ("--port", "0", "--ep", "cpu")),
    ],
    ids=["alloc-run", "alloc-bench", "alloc-serve"],
)
def test_an_artifact_without_a_price_says_how_to_compile_one(
    bundle: Path, command: Any, options: tuple[str, ...]
) -> None:
    outcome = invoke(command, bundle, *options, "--hold")
    assert outcome.exit_code == 1
    assert "can't be held. Compile it with --redistribute price and no cap" in outcome.stderr


def test_a_session_that_does_not_count_is_refused(dial_bundle: Path) -> None:
    model = load(dial_bundle, ep="cpu")
    with pytest.raises(GenerationError, match="Open it with count_activations=True"):
        model.generate(["a"], hold=True)


def test_a_session_on_a_gpu_is_refused(dial_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(dial_bundle, ep="cpu", count_activations=True).session
    monkeypatch.setattr(session, "device", "cuda")
    with pytest.raises(
        GenerationError, match=r"runs on a GPU, where .* held\. Run it with --ep cpu"
    ):
        held_budget(session)


def test_an_artifact_for_cuda_is_refused_on_the_cpu_by_what_it_was_compiled_for(
    dial_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "for-cuda"
    shutil.copytree(dial_bundle, folder)
    graph = ir.load(folder / MODEL_FILE)
    graph.metadata_props[PADDING_KEY] = "right"
    ir.save(graph, folder / MODEL_FILE)
    outcome = invoke(run_command, folder, *PROMPT, "--hold")
    assert outcome.exit_code == 1
    words = " ".join(outcome.stderr.split())
    assert "was compiled with --device cuda, and such artifacts don't count experts token" in words
    assert "so its budget can't be held. Compile it with --device cpu, or don't hold" in words
    assert "GPU" not in words
    assert "--ep" not in words


def test_answers_are_held(chat_bundle: Path) -> None:
    options = ("--ep", "cpu", "--chat", "--hold", "--max-new-tokens", "6")
    outcome = invoke(run_command, chat_bundle, *options, typed="One\n/stats\n")
    assert outcome.exit_code == 0, outcome.stderr
    model = load(chat_bundle, ep="cpu", count_activations=True)
    message = [{"role": "user", "content": "One"}]
    [expected] = model.generate(messages=message, max_new_tokens=6, hold=True)
    assert outcome.stdout == f"{expected.text}\n"
    assert f"per token: {expected.experts_per_token:.4g} of 8, over" in outcome.stderr


def test_held_budgets_are_timed_beside_the_others(dial_bundle: Path, toy: Path) -> None:
    small = ("--prompt-tokens", 20, "--past", 4, "--new-tokens", 2, "--runs", 1, "--ep", "cpu")
    outcome = invoke(bench_command, dial_bundle, *small, "--budget", "3", "--hold", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found = [
        (entry["artifact"].removeprefix(str(dial_bundle)), entry["price"] is None, entry["held"])
        for entry in json.loads(outcome.stdout)["artifacts"]
    ]
    assert found == [
        ("", True, None),
        (" at 3", False, None),
        (", held", True, 4),
        (" at 3, held", True, 3),
    ]
    outcome = invoke(bench_command, dial_bundle, toy, "--hold")
    assert outcome.exit_code == 2
    assert "--hold is for one artifact" in outcome.stderr
