"""Numbers of the commands: what is refused, and what the help says of it."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.compiler.commands.alloc_profile import profile_command
from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.commands.alloc_serve import serve_command
from alloc_moe.runtime.commands.numeric import FiniteFrom, WholeFrom, seed_type

COMMANDS = (
    *(compile_command, eval_command, profile_command, sweep_command),
    *(bench_command, run_command, serve_command),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_tells_no_end_that_only_guards(command: click.Command) -> None:
    shown = CliRunner().invoke(command, ["--help"]).stdout
    told = [float(end) for end in re.findall(r"x<=?([\d.]+)", shown)]
    assert all(end <= 86_400 for end in told)  # a day, a port, threads
    assert len(re.findall(r"x>=?\d", shown)) >= 2


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (WholeFrom(2, 10), "11", "11 is more than 10, the most there can be."),
        (WholeFrom(2, 10), "1", "1 is not in the range x>=2."),
        (seed_type, str(2**63), "9223372036854775808 is more than 9223372036854775807"),
        (FiniteFrom(1, 1e6), "inf", "inf is more than 1e+06, the most there can be."),
        (FiniteFrom(1, 1e6), "nan", "nan is no number."),
        (FiniteFrom(0, 1e6, above=True), "0", "0.0 is not in the range x>0."),
    ],
)
def test_what_is_no_real_number_of_something_is_refused(
    kind: click.ParamType, text: str, message: str
) -> None:
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(text, None, None)
    assert message in str(refused.value)


def test_the_ends_themselves_are_taken() -> None:
    assert [WholeFrom(2, 10).convert(text, None, None) for text in ("2", "10")] == [2, 10]
    assert FiniteFrom(1, 1e6).convert("1e6", None, None) == 1e6
