"""Command lines of any words: done, refused in one sentence, never a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.commands.alloc_profile import profile_command
from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.commands.alloc_run import run_command

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1e400", "9" * 40, "1e9", "2000", "x"]
WORDS = ["", "-", "--", "a", "é", "\udce9", "\x1b[31m", "{folder}", "{text}", "a" * 5000]
OPTIONS = {
    "run": ["--prompt", "--prompt-file", "--max-new-tokens", "--temperature", "--top-p", "--seed"],
    "eval": ["--text", "--window", "--stride", "--tokens", "--decode", "--plan"],
    "bench": ["--prompt-tokens", "--past", "--new-tokens", "--runs", "--seed"],
    "inspect": ["--check", "--json", "-q"],
}
SHARED = ["--budget", "--ep", "--threads", "--tokenizer", "--json", "-q", "--session", "--nonsense"]
COMMANDS = {
    "run": run_command,
    "eval": eval_command,
    "bench": bench_command,
    "inspect": inspect_command,
}
SMALL = {
    "run": ["{artifact}", "--ep", "cpu", "--prompt", "a", "--max-new-tokens", "2"],
    "eval": ["{artifact}", "--ep", "cpu", "--text", "{text}", "--window", "8"],
    "bench": ["{artifact}", "--ep", "cpu", "--prompt-tokens", "2", "--past", "1", "--runs", "1"],
    "inspect": ["{artifact}"],
}


def ends_well(command: click.Command, arguments: list[str]) -> int:
    """Run a command in this process, and return its exit code."""
    outcome = CliRunner().invoke(command, arguments)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), arguments
    assert outcome.exit_code in (0, 1, 2), arguments
    if outcome.exit_code == 1:
        assert "Error: " in outcome.stderr
    return outcome.exit_code


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_any_words_after_any_command(
    toy_graph: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "text.txt").write_text("The committee")
    names = {"artifact": str(toy_graph), "folder": str(folder), "text": f"{folder}/text.txt"}
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    arguments = list(SMALL[name])
    for _ in range(data.draw(st.integers(1, 3))):
        option = data.draw(st.sampled_from(OPTIONS[name] + SHARED))
        value = data.draw(st.sampled_from(NUMBERS + WORDS) | st.text(max_size=4))
        value = value.replace("\0", "")  # the system passes none on
        # The toy's context is short; what would take long is refused before anything runs.
        if option in ("--runs", "--new-tokens") and value in ("2000", "1e9"):
            value = "3"
        arguments += [option, value] if data.draw(st.integers(0, 9)) else [option]
    for key, value in names.items():
        arguments = [argument.replace(f"{{{key}}}", value) for argument in arguments]
    ends_well(COMMANDS[name], arguments)


@pytest.mark.parametrize(
    ("command", "needed", "options"),
    [
        (run_command, ["x", "--prompt", "a"], "--threads --max-new-tokens --temperature --top-p"),
        (run_command, ["x", "--prompt", "a"], "--seed --budget"),
        (bench_command, ["x"], "--threads --prompt-tokens --past --new-tokens --runs --seed"),
        (bench_command, ["x"], "--budget"),
        (eval_command, ["x", "--text", "x"], "--threads --window --stride --tokens --budget"),
        (compile_command, ["x", "-o", "x.onnx", "--budget", "0.5"], "--tokens --seed --cost-batch"),
        (compile_command, ["x", "-o", "x.onnx", "--budget", "0.5"], "--cap --refine --block"),
        (compile_command, ["x", "-o", "x.onnx", "--budget", "0.5"], "--refine-minutes --budget"),
        (compile_command, ["x", "-o", "x.onnx"], "--target-bytes --target-loss"),
        (profile_command, ["x", "-o", "x.json"], "--tokens --seed"),
        (
            sweep_command,
            ["x", "-o", "x", "--text", "x"],
            "--tokens --text-tokens --seeds --budgets --targets",
        ),
        (sweep_command, ["x", "-o", "x", "--text", "x"], "--threads"),
    ],
)
def test_every_number_refuses_what_is_none(
    command: click.Command, needed: list[str], options: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in options.split():
        for value in ("nan", "inf", "-inf", "-1", "1e400", "9" * 40, "x", ""):
            outcome = CliRunner().invoke(command, [*needed, option, value])
            assert outcome.exit_code == 2, (option, value, outcome.output)
            assert outcome.stderr.count("Error: ") == 1


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (run_command, ["x", "--prompt", "a", "--threads", "2000"]),
        (run_command, ["x", "--prompt", "a", "--max-new-tokens", "1000000000"]),
        (run_command, ["x", "--prompt", "a", "--top-p", "0"]),
        (eval_command, ["x", "--text", "x", "--window", "1"]),
        (eval_command, ["x", "--text", "x", "--stride", "0"]),
        (bench_command, ["x", "--past", "99999999"]),
        (bench_command, ["x", "--runs", "0"]),
    ],
)
def test_absurd_sizes_are_wrong_usage(command: click.Command, arguments: list[str]) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2


def test_files_of_every_kind_where_an_artifact_is_expected(toy_graph: Path, tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"{}"), ("zeros", bytes(4096))):
        (tmp_path / f"{name}.onnx").write_bytes(content)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "loop.onnx").symlink_to(tmp_path / "loop.onnx")
    shutil.copy(toy_graph, tmp_path / "alone.onnx")
    for path in sorted(tmp_path.glob("*.onnx")):
        for name, arguments in SMALL.items():
            given_ = [str(path) if word == "{artifact}" else word for word in arguments]
            given_ = [str(toy_graph) if word == "{text}" else word for word in given_]
            code = ends_well(COMMANDS[name], given_)
            assert code == (0 if (path.stem, name) == ("alone", "inspect") else 1), (path, name)
