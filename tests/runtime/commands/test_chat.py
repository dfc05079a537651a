"""alloc-run --chat: what is typed, what is said."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.commands.chat import Chat
from alloc_moe.runtime.console import Console
from alloc_moe.runtime.text.model import TextModel, load


def chat(bundle: Path, typed: str, *options: str) -> Result:
    command = ["--ep", "cpu", "--chat", "--max-new-tokens", "6", *options, str(bundle)]
    return CliRunner().invoke(run_command, command, input=typed.encode())


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> TextModel:
    return load(chat_bundle, ep="cpu")


def answer(model: TextModel, *said: str, budget: float | None = None) -> str:
    """Return what the model answers to what the two sides said in turns."""
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)
    ]
    return model.generate(messages=messages, max_new_tokens=6, budget=budget)[0].text


def test_every_line_is_answered_with_what_was_said_before(
    chat_bundle: Path, model: TextModel
) -> None:
    first = answer(model, "One")
    second = answer(model, "One", first, "Two")
    outcome = chat(chat_bundle, "One\n\n Two \n")
    assert outcome.stdout == f"{first}\n{second}\n"
    assert outcome.exit_code == 0


def test_the_dial_turns_in_the_middle(chat_bundle: Path, model: TextModel) -> None:
    first = answer(model, "One")
    dialled = answer(model, "One", first, "Two", budget=1.0)
    assert dialled != answer(model, "One", first, "Two")
    outcome = chat(chat_bundle, "One\n/budget 1.0\nTwo\n/stats\n/budget\n")
    assert outcome.stdout == f"{first}\n{dialled}\n"
    assert "From now on the budget is 1.0." in outcome.stderr
    assert "Experts executed per token: 4 of 8, over" in outcome.stderr  # the toy's most
    assert "By layer: 2.000 2.000\nPlan:     2.000 2.000" in outcome.stderr
    assert "The budget is 1.0. Set it" in outcome.stderr


def test_a_lower_budget_runs_fewer_experts(chat_bundle: Path) -> None:
    outcome = chat(chat_bundle, "/budget 3\nOne\n/stats\n")
    found = re.search(r"per token: ([\d.]+) of 8, over (\d+) tokens", outcome.stderr)
    assert found is not None
    assert 2 <= float(found[1]) < 3.5
    assert int(found[2]) == len("u:One\na:") + 6 - 1


def test_a_budget_off_the_dial_is_said_and_changes_nothing(
    chat_bundle: Path, model: TextModel
) -> None:
    outcome = chat(chat_bundle, "/budget 0.1\n/budget nonsense\nOne\n")
    assert "The budget 0.1 is 0 of 8 activations per token, below" in outcome.stderr
    assert "'nonsense' is no positive number" in outcome.stderr
    assert outcome.stdout == answer(model, "One") + "\n"


def test_a_new_conversation_keeps_the_system_message(chat_bundle: Path, model: TextModel) -> None:
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "One"}]
    [expected] = model.generate(messages=messages, max_new_tokens=6)
    outcome = chat(chat_bundle, "One\n/clear\nOne\n/quit\nTwo\n", "--system", "Short.")
    assert outcome.stdout == f"{expected.text}\n" * 2


def test_a_full_context_is_said_and_the_message_forgotten(
    chat_bundle: Path, model: TextModel
) -> None:
    outcome = chat(chat_bundle, f"{'x' * 70}\nOne\n/stats\n")
    assert "The conversation fills the model's context of 64 tokens" in outcome.stderr
    assert outcome.stdout == answer(model, "One") + "\n"


def test_an_answer_takes_no_more_than_the_context_has_left(chat_bundle: Path) -> None:
    outcome = chat(chat_bundle, "x" * 56)  # 60 tokens with the template's own
    assert outcome.exit_code == 0
    assert "fills" not in outcome.stderr


def test_unknown_commands_are_explained(chat_bundle: Path) -> None:
    outcome = chat(chat_bundle, "/nonsense \x1b[31m\n/stats\n")
    assert "There is no command /nonsense." in outcome.stderr
    assert "/budget B" in outcome.stderr
    assert "There is no answer yet" in outcome.stderr


def test_a_model_that_cannot_chat_says_so_at_once(bundle: Path) -> None:
    outcome = chat(bundle, "One\n")
    assert outcome.exit_code == 1
    assert "has no chat template: as far as it says, the model continues texts" in outcome.stderr


def test_a_first_budget_off_the_dial_is_an_error(chat_bundle: Path) -> None:
    outcome = chat(chat_bundle, "One\n", "--budget", "0.1")
    assert outcome.exit_code == 1
    assert "The budget 0.1 is 0 of 8 activations per token, below" in outcome.stderr


@pytest.mark.parametrize(
    "options", [["--chat", "--prompt", "a"], ["--chat", "--json"], ["--system", "a"]]
)
def test_options_that_do_not_go_together(chat_bundle: Path, options: list[str]) -> None:
    assert CliRunner().invoke(run_command, [str(chat_bundle), *options]).exit_code == 2


def test_an_interrupted_answer_stays_in_the_conversation(
    model: TextModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console, said = Console(quiet=True), []

    def interrupt_later(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "stream", interrupt_later)
    talk = Chat(model, console, max_new_tokens=6, settings={})
    talk.run(iter(["One"]))
    part = "".join(said[:3])
    monkeypatch.undo()
    talk.run(iter(["Two"]))
    assert capsys.readouterr().out == answer(model, "One", part, "Two") + "\n"


def test_options_of_drawing_reach_the_model(chat_bundle: Path, model: TextModel) -> None:
    command = [str(chat_bundle), "--ep", "cpu", "--prompt", "One", "--max-new-tokens", "12"]
    outcome = CliRunner().invoke(run_command, [*command, "--repetition-penalty", "1.7"])
    from alloc_moe.runtime.text.sampling import Sampling

    sampling = Sampling(repetition_penalty=1.7)
    [expected] = model.generate(["One"], max_new_tokens=12, sampling=sampling)
    assert outcome.stdout == f"One{expected.text}\n"
    assert expected != model.generate(["One"], max_new_tokens=12)[0]
    stop = expected.text[3:5]
    outcome = CliRunner().invoke(
        run_command, [*command, "--repetition-penalty", "1.7", "--stop", stop]
    )
    assert outcome.stdout == f"One{expected.text.partition(stop)[0]}\n"


def test_a_talk_at_a_terminal(chat_bundle: Path, model: TextModel) -> None:
    controller, terminal = pty.openpty()
    code = "from alloc_moe.runtime.commands.alloc_run import run_command; run_command()"
    command = [sys.executable, "-c", code, str(chat_bundle), "--ep", "cpu", "--chat"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "6"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = ""

    def until(pattern: str) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while not re.search(pattern, shown) and time.monotonic() < end:
            shown += os.read(controller, 4096).decode()
        assert re.search(pattern, shown), shown

    until("> ")
    os.write(controller, "Zoë\n".encode())
    until("(?s)> .*> ")
    os.write(controller, b"/stats\n")
    until("Experts executed per token")
    until("Plan: .*\n> ")
    os.write(controller, b"\x04")
    assert process.wait(timeout=120) == 0
    assert process.stdout is not None
    assert process.stdout.read().decode(errors="replace") == answer(model, "Zoë") + "\n"
    process.stdout.close()
    os.close(controller)
