"""The tables of precisions and of roundings, on a small random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner


@pytest.mark.slow
def test_the_table_of_precisions_has_a_row_per_type(
    load: Callable[[str], ModuleType], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, dtype=np.uint8).tobytes())
    sizes = ["--text-tokens", "512", "--tokens", "256", "--budget", "0.5"]
    main = load("benchmarks/quality/precision").main
    outcome = CliRunner().invoke(main, [str(checkpoint("olmoe")), "--text", str(text), *sizes])
    assert outcome.exit_code == 0, outcome.output
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[3].strip() for row in rows] == ["float32", "int8", "int4"]
    divergences = [float(row.split("|")[6]) for row in rows]
    assert divergences[0] == 0 < divergences[1] < divergences[2]


@pytest.mark.slow
def test_the_table_of_roundings_has_a_row_per_budget(
    load: Callable[[str], ModuleType], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, dtype=np.uint8).tobytes())
    sizes = ["--text-tokens", "512", "--tokens", "256", "--seeds", "2", "--dtype", "int4"]
    main = load("benchmarks/quality/rounding").main
    outcome = CliRunner().invoke(main, [str(checkpoint("olmoe")), "--text", str(text), *sizes])
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split(" | ") for line in outcome.stdout.splitlines()][2:]
    assert [row[1:4] for row in rows] == [["int4", "1.0", "text.txt"], ["int4", "0.5", "text.txt"]]
    assert all(" to " in cell for row in rows for cell in row[4:])
