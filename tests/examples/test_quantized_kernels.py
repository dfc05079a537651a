"""Kernels alone: quantised ones on a tiny shape, ways to compute latent attention."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from click.testing import CliRunner


def test_kernels_are_timed_whole_and_in_halves(
    speed: Callable[[str], ModuleType], read_little: Callable[[ModuleType], None]
) -> None:
    kernels = speed("quantized_kernels")
    read_little(kernels)
    options = ["--shape", "tiny", "--tokens", "4", "--runs", "1"]
    outcome = CliRunner().invoke(kernels.main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("|")[1].strip() for line in outcome.stdout.splitlines() if "|" in line]
    assert rows == ["block", "---:", "32", "64", "experts", "---:", "1", "2", "3", "4"]


def test_all_ways_are_timed_after_every_past(speed: Callable[[str], ModuleType]) -> None:
    options = ["--layers", "1", "--past", "8", "--past", "16", "--runs", "1", "--threads", "1"]
    outcome = CliRunner().invoke(speed("latent_attention").main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("|")[1:-1] for line in outcome.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["a layer, ms", "past 8", "past 16"]
    assert len(rows[2:]) == 4
    assert all(float(cell.split()[0]) > 0 for row in rows[2:] for cell in row[1:])
