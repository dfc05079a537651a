"""The tables of precisions and of roundings, on a small random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner


@pytest.fixture
def table(
    load: Callable[[str], ModuleType], checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[..., list[str]]:
    """Return what runs a benchmark on a text of random letters, and gives the lines it prints."""
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, dtype=np.uint8).tobytes())

    def run(name: str, *options: str) -> list[str]:
        given = [str(checkpoint("olmoe")), "--text", str(text), "--text-tokens", "512", *options]
        outcome = CliRunner().invoke(load(f"benchmarks/quality/{name}").main, given)
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout.splitlines()

    return run


@pytest.mark.slow
def test_the_table_of_precisions_has_a_row_per_type(table: Callable[..., list[str]]) -> None:
    lines = table("precision", "--tokens", "256", "--budget", "0.5")
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split("|")[3].strip() for row in rows] == ["float32", "int8", "int4"]
    divergences = [float(row.split("|")[6]) for row in rows]
    assert divergences[0] == 0 < divergences[1] < divergences[2]


@pytest.mark.slow
def test_the_table_of_roundings_has_a_row_per_budget(table: Callable[..., list[str]]) -> None:
    lines = table("rounding", "--tokens", "256", "--seeds", "1", "--dtype", "int4")
    rows = [line.split(" | ") for line in lines][2:]
    assert [row[1:4] for row in rows] == [["int4", "1.0", "text.txt"], ["int4", "0.5", "text.txt"]]
    assert all(" to " in cell for row in rows for cell in row[4:6])
    assert all(float(cell.rstrip(" |")) > 0 for row in rows for cell in row[6:])
