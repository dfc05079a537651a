"""The quantised kernels alone, on a tiny shape."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from click.testing import CliRunner


def test_kernels_are_timed_whole_and_in_halves(speed: Callable[[str], ModuleType]) -> None:
    options = ["--shape", "tiny", "--tokens", "4", "--runs", "1"]
    outcome = CliRunner().invoke(speed("quantized_kernels").main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("|")[1].strip() for line in outcome.stdout.splitlines() if "|" in line]
    assert rows == ["block", "---:", "32", "64", "experts", "---:", "1", "2", "3", "4"]
