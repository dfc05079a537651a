"""alloc-eval on artifacts and on models with a plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.records import Compiled


@pytest.fixture
def compiled(compile_to: Callable[..., Compiled], tmp_path: Path) -> Callable[..., Path]:
    """Return what compiles the model with some options."""
    return lambda **options: compile_to(tmp_path / "out.onnx", **options).path


@pytest.fixture
def artifact(compiled: Callable[..., Path]) -> Path:
    """An artifact with a uniform plan, which holds on any text."""
    return compiled(allocation="uniform", redistribute="batch", correct="none")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("Few experts are enough for most of the tokens. " * 6)
    return tmp_path / "text.txt"


def evaluated(*arguments: str | Path) -> Result:
    return CliRunner().invoke(eval_command, list(map(str, arguments)))


@pytest.mark.parametrize("redistribution", ["batch", "price"])
def test_artifact_and_model_are_evaluated_alike(
    model: str, compiled: Callable[..., Path], text: Path, redistribution: str
) -> None:
    artifact = compiled(redistribute=redistribution, correct="none")
    options = ("--text", text, "--window", "64", "--json", "-q")
    of_artifact = json.loads(evaluated(artifact, *options, "--ep", "cpu").stdout)
    of_model = json.loads(evaluated(model, *options, "--plan", artifact).stdout)
    assert of_artifact["loss"] == pytest.approx(of_model["loss"], rel=1e-5)
    for key in ("tokens_scored", "tokens_run", "activations", "window", "stride"):
        assert of_artifact[key] == of_model[key], key
    assert of_artifact["plan"] == of_model["plan"]
    full = json.loads(evaluated(model, *options).stdout)
    assert full["activations_per_token"] == [4, 4, 4]


def test_conversations_are_told_by_the_chat_template(
    model: str, artifact: Path, tmp_path: Path
) -> None:
    talker = shutil.copytree(model, tmp_path / "talker")
    (talker / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    text = tmp_path / "told.txt"
    text.write_text("Few experts are enough for most of the tokens. " * 6)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": text.read_text()}]}))
    options = ("--window", "64", "--json", "-q")
    expected = json.loads(evaluated(artifact, "--text", text, *options).stdout)["loss"]
    runs = ((artifact, "--tokenizer", talker), (talker, "--plan", artifact))
    for run in runs:
        found = json.loads(evaluated(*run, "--text", chats, *options).stdout)["loss"]
        assert found == pytest.approx(expected, rel=1e-5)
    for target in (artifact, model):
        outcome = evaluated(target, "--text", chats)
        assert (outcome.exit_code, outcome.stdout) == (1, "")
        assert "chats.jsonl can't be read at line 1: it is a conversation, but" in outcome.stderr


def test_a_plan_with_a_correction_needs_its_artifact(
    model: str, compiled: Callable[..., Path], text: Path
) -> None:
    artifact = compiled()
    outcome = evaluated(model, "--text", text, "--plan", artifact)
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert f"The plan in {artifact} has a correction" in outcome.stderr
    assert "Evaluate the artifact." in outcome.stderr
    assert evaluated(artifact, "--text", text, "--ep", "cpu").exit_code == 0


def test_an_evaluation_shows_plan_and_executed_experts(artifact: Path, text: Path) -> None:
    outcome = evaluated(artifact, "--text", text, "--ep", "cpu")
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("Perplexity ")
    assert lines[1:] == [
        "Experts executed per token: 6.0000 of 12 (plan: 6)",
        "By layer: 2.0000 2.0000 2.0000",
        "Plan:     2      2      2",
    ]


def test_options_of_the_other_kind_of_target_are_wrong_usage(
    model: str, artifact: Path, text: Path
) -> None:
    outcome = evaluated(artifact, "--text", text, "--plan", artifact)
    assert outcome.exit_code == 2
    assert "--plan is for original models" in outcome.stderr
    outcome = evaluated(model, "--text", text, "--decode")
    assert outcome.exit_code == 2
    assert "--decode is for artifacts" in outcome.stderr
    assert "--hold is for artifacts" in evaluated(model, "--text", text, "--hold").stderr


def test_a_held_budget_is_evaluated(compiled: Callable[..., Path], text: Path) -> None:
    artifact = compiled(correct="none")
    options = (artifact, "--text", text, "--ep", "cpu", "--window", "64", "-q")
    plain, held = (
        json.loads(evaluated(*options, *more, "--json").stdout) for more in ([], ["--hold"])
    )
    planned = plain["plan"]["budget"]["activations"]
    off, kept = (abs(sum(d["activations_per_token"]) / planned - 1) for d in (plain, held))
    assert kept < 0.02 < off
    assert (plain["hold"], held["hold"], held["price"]) == (False, True, None)
    assert held["tokens_run"] == plain["tokens_run"]
    said = evaluated(*options, "--hold", "--budget", "7").stdout
    assert "of 12 (budget: 7, held)" in said


def test_a_plan_of_another_model_is_refused(
    checkpoint: Callable[[str], Path], artifact: Path, text: Path
) -> None:
    outcome = evaluated(checkpoint("mixtral"), "--text", text, "--plan", artifact)
    assert outcome.exit_code == 1
    assert "is for 3 MoE layers" in outcome.stderr
    assert "has 2" in outcome.stderr


def test_a_text_that_cant_be_read_is_reported(artifact: Path) -> None:
    outcome = evaluated(artifact, "--text", "gone.txt")
    assert outcome.exit_code == 1
    assert "gone.txt can't be read" in outcome.stderr
