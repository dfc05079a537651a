"""Common options, exit codes, output channels and progress of every command."""

from __future__ import annotations

import json
import logging

import click
import pytest
from click.testing import CliRunner

from alloc_moe.runtime.commands.options import common_options, examples
from alloc_moe.runtime.console import Console, Progress, duration
from alloc_moe.runtime.errors import ArtifactError


@click.command(epilog=examples("do-it --what ever"))
@click.option("--fail", type=click.Choice(["input", "bug", "interrupt"]))
@common_options
def do_it(console: Console, fail: str | None) -> None:
    """Do it."""
    if fail == "input":
        raise ArtifactError("No file here. Give another path.")
    if fail == "bug":
        raise ZeroDivisionError("a bug")
    if fail == "interrupt":
        raise KeyboardInterrupt
    console.note("a note")
    console.warn("a warning")
    logging.getLogger("alloc_moe.some.module").info("an info of %s", "the log")
    logging.getLogger("alloc_moe.some.module").debug("a detail")
    console.stream("streamed ")
    console.result("done", {"done": True, "loss": float("nan"), "list": [float("inf"), 1.5]})


def test_result_goes_to_stdout_and_all_else_to_stderr() -> None:
    outcome = CliRunner().invoke(do_it, [])
    assert outcome.exit_code == 0
    assert outcome.stdout == "streamed done\n"
    assert outcome.stderr == "a note\nWarning: a warning\nan info of the log\n"


def test_json_is_the_only_thing_on_stdout_and_has_no_nan() -> None:
    outcome = CliRunner().invoke(do_it, ["--json"])
    assert json.loads(outcome.stdout) == {"done": True, "loss": None, "list": [None, 1.5]}
    assert "a note" in outcome.stderr


def test_quiet_leaves_only_warnings() -> None:
    assert CliRunner().invoke(do_it, ["-q"]).stderr == "Warning: a warning\n"


def test_debug_shows_the_debug_log() -> None:
    assert "a detail" in CliRunner().invoke(do_it, ["--debug"]).stderr


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("alloc_moe")
    before = (logger.level, list(logger.handlers))
    CliRunner().invoke(do_it, ["--debug"])
    assert (logger.level, list(logger.handlers)) == before


def test_input_error_is_one_paragraph_and_exit_code_1() -> None:
    outcome = CliRunner().invoke(do_it, ["--fail", "input"])
    assert outcome.exit_code == 1
    assert outcome.stderr == "Error: No file here. Give another path.\n"
    assert outcome.stdout == ""


def test_debug_keeps_the_traceback_of_an_input_error() -> None:
    outcome = CliRunner().invoke(do_it, ["--fail", "input", "--debug"])
    assert isinstance(outcome.exception, ArtifactError)


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(CliRunner().invoke(do_it, ["--fail", "bug"]).exception, ZeroDivisionError)


def test_interrupt_is_one_line_and_exit_code_130() -> None:
    outcome = CliRunner().invoke(do_it, ["--fail", "interrupt"])
    assert (outcome.exit_code, outcome.stderr) == (130, "Interrupted.\n")


def test_wrong_usage_is_exit_code_2() -> None:
    assert CliRunner().invoke(do_it, ["--fail", "nonsense"]).exit_code == 2


def test_help_shows_the_example_unwrapped() -> None:
    outcome = CliRunner().invoke(do_it, ["--help"])
    assert "Example:\n    do-it --what ever" in outcome.stdout
    assert "--json" in outcome.stdout


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("alloc_moe.runtime.console.time.monotonic", clock)
    return clock


def test_plain_progress_reports_every_five_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console().progress("Profiling", 5, unit="layers", done=1) as progress:
        for _ in range(4):
            clock.now += 3
            progress.advance()
    assert capsys.readouterr().err.splitlines() == [
        "Profiling: 3/5 layers, 3 s each, 6.0 s left",
        "Profiling: 4 layers in 12 s",
    ]


def test_terminal_progress_is_a_bar_with_notes_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    with console.progress("Profiling", 2, unit="layers") as progress:
        console.note("a [note] between")
        progress.advance(2)
    written = capsys.readouterr().err
    assert "a [note] between" in written
    assert "2/2 layers" in written


def test_quiet_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True).progress("Profiling", 4) as progress:
        progress.advance(4)
    assert progress.done == 4
    assert capsys.readouterr().err == ""


def test_progress_without_total_has_no_time_left() -> None:
    progress = Progress("Reading", None, unit="bytes")
    progress.advance(10)
    assert progress.state().startswith("10 bytes")
    assert "left" not in progress.state()


def test_rate_leaves_out_what_was_done_before() -> None:
    progress = Progress("Profiling", 10, unit="layers", done=9)
    assert progress.state() == "9/10 layers"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration_is_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
