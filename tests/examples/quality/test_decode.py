"""The tables of single-stream decode and of the dial, on a small random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner


@pytest.mark.slow
def test_both_tables_have_a_row_per_method_and_budget(
    load: Callable[[str], ModuleType],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = load("benchmarks/quality/decode")
    monkeypatch.setattr(decode, "DECODED", ("uniform", "default"))
    monkeypatch.setattr(decode, "BUDGETS", ("0.5",))
    monkeypatch.setattr(decode, "WINDOW", 128)
    monkeypatch.setattr(decode, "STRIDE", 64)
    model = checkpoint("olmoe")
    sizes = ["--tokens", "256", "--decode-tokens", "200", "--dial-tokens", "300"]
    options = [str(model), "--text", str(model / "calibration.txt"), *sizes]
    outcome = CliRunner().invoke(decode.main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split(" | ") for line in outcome.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip("| ") for row in rows]
    assert names == [
        "at half the activations",
        "uniform k",
        "price + token sizes + affine (default)",
        "budget",
        "0.5",
    ]
    assert [float(row[2].strip("| ")) for row in rows[1:3]] == pytest.approx([6, 6], rel=0.2)
    compiled, dialled = (cell.split(" ")[0] for cell in rows[4][1:3])
    assert compiled == dialled  # it is the same artifact, at the price it was compiled for
