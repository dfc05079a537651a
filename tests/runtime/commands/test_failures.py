"""Streams that lead nowhere, errors of others, words that a terminal would obey: one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_inspect import inspect_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.commands.failures import Command
from alloc_moe.runtime.commands.options import common_options
from alloc_moe.runtime.console import Console, printable
from alloc_moe.runtime.errors import AllocMoeError

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


class PanicException(BaseException):  # the name that pyo3 gives it
    """Stands for a panic of a library in Rust."""


def fails_with(error: BaseException, *options: str) -> click.testing.Result:
    @click.command(cls=Command)
    @common_options
    def command(console: Console) -> None:
        raise error

    return CliRunner().invoke(command, options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PanicException("index out\nof bounds"), "The tokenizer failed: index out of bounds"),
        (Fail("[ONNXRuntimeError] : 1 : FAIL : broken"), "onnxruntime failed: "),
        (MemoryError(), "There isn't enough memory."),
        (OSError(errno.ENOSPC, "No space left on device"), "The system reports: No space"),
        (OSError(errno.EIO, "Input/output error", "a\x1bb"), r"a\x1bb can't be used: Input/output"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_others_are_one_sentence(error: BaseException, message: str) -> None:
    outcome = fails_with(error)
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(f"Error: {message}")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" in fails_with(error, "--debug").stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    outcome = fails_with(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (outcome.exit_code, outcome.stderr) == (1, "")


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which `run`, `inspect` and `bench` are commands."""
    names = {"run": "run", "inspect": "inspect", "bench": "bench"}
    start = "".join(
        f'{name}() {{ "{sys.executable}" -c "from alloc_moe.runtime.commands.alloc_{name} import '
        f'{name}_command as c; c()" "$@"; }}\n'
        for name in names
    )
    return subprocess.run(
        ["bash", "-c", start + command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=False,
    )


@posix
@pytest.mark.parametrize(
    ("command", "code", "stderr"),
    [
        ("inspect model.onnx >&-", 1, "stdout is closed"),
        ("inspect model.onnx >/dev/full", 1, "can't be printed: No space left on device"),
        ("inspect model.onnx --json >/dev/full", 1, "can't be printed: No space left on device"),
        ("inspect --help >/dev/full", 1, "No space left on device"),
        ("inspect model.onnx 2>&-", 0, ""),
        ("inspect gone.onnx 2>/dev/full", 1, ""),
        ("inspect 2>/dev/full", 1, ""),
        ("inspect model.onnx | true; exit ${PIPESTATUS[0]}", None, ""),
        ("mkfifo pipe.onnx; inspect pipe.onnx", 1, "it is a folder, pipe or device"),
        ("mkdir gone; cd gone; rmdir ../gone; inspect model.onnx", 1, "no file model.onnx"),
    ],
)
def test_streams_that_lead_nowhere(
    bundle: Path, tmp_path: Path, command: str, code: int | None, stderr: str
) -> None:
    (tmp_path / "model.onnx").symlink_to(bundle / "model.onnx")
    outcome = shell(command, tmp_path)
    assert code in (outcome.returncode, None)
    assert "Traceback" not in outcome.stderr
    assert stderr in outcome.stderr
    assert outcome.stderr.count("Error") <= 1


@posix
def test_texts_are_utf8_whatever_the_locale_says(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dé"
    folder.symlink_to(bundle)
    line = "run dé --ep cpu -q --prompt é --max-new-tokens 1 --json"
    ascii_ = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    outcome = shell(line, tmp_path, **ascii_)
    assert outcome.returncode == 0, outcome.stderr
    assert '"prompt_ids": [195, 169]' in outcome.stdout
    outcome = shell(r"run dé --ep cpu --prompt $'\xe9'", tmp_path)
    assert outcome.returncode == 2
    assert "is no UTF-8 text" in outcome.stderr


@posix
def test_prompts_come_from_pipes_that_are_written_to(bundle: Path, tmp_path: Path) -> None:
    line = f"run {bundle} --ep cpu -q --max-new-tokens 1 --prompt-file"
    assert shell(f"{line} <(echo The)", tmp_path).stdout.startswith("The\n")
    outcome = shell(f"mkfifo pipe; {line} pipe", tmp_path)
    assert outcome.returncode == 1
    assert "pipe can't be read: it is a folder, pipe or device" in outcome.stderr
    outcome = shell(f"{line} - <&-", tmp_path)
    assert outcome.returncode == 1
    assert "stdin is closed" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢\n\t", "plain é 漢\n\t"),
        ("\x1b[31m\x07\x9b\r\x7f", r"\x1b[31m\x07\x9b\r\x7f"),
        ("\u202ea\u2028", r"\u202ea\u2028"),
        ("👩\u200d🚀 \u200f", "👩\u200d🚀 \u200f"),
    ],
)
def test_what_steers_a_terminal_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_in_artifacts_are_never_printed_raw(
    plan: AllocationPlan, make_toy: Callable[..., Path], tmp_path: Path
) -> None:
    text = plan.to_json().replace("nowhere/toy", r"\u001b]0;title\u0007")
    text = text.replace("model.layers.0", r"\u001b[2Jx\ny").replace('"kl"', r'"\u009b31m"')
    path = make_toy(tmp_path / "out.onnx", plan=text)
    outcome = CliRunner().invoke(inspect_command, [str(path)])
    assert outcome.exit_code == 0
    assert not set(outcome.stdout) & set("\x1b\x07\x9b")
    assert r"\x1b]0;title\x07" in outcome.stdout
    assert r"\x1b[2Jx\ny" in outcome.stdout
    text = text.replace('"weights": "keep"', r'"weights": "\u001bc"')
    broken = make_toy(tmp_path / "b.onnx", plan=text)
    for command in (inspect_command, bench_command):
        outcome = CliRunner().invoke(command, [str(broken)])
        assert outcome.exit_code == 1
        assert "\x1b" not in outcome.stderr


def test_what_a_model_writes_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Console().stream("a\x1b[31m\n\u200f")
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console().stream("a\x1b[31m\n\u200f")
    Console().result("b\x9b", {})
    assert capsys.readouterr().out == "a\\x1b[31m\n\u200fb\\x9b\n"


def test_a_result_needs_a_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(AllocMoeError, match="stdout is closed"):
        Console().result("text", {})


def test_a_text_that_is_none_is_wrong_usage(bundle: Path) -> None:
    outcome = CliRunner().invoke(run_command, [str(bundle), "--prompt", "a\udce9"])
    assert outcome.exit_code == 2
    assert "is no UTF-8 text" in outcome.stderr
