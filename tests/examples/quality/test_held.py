"""The table of held budgets, on a small random model."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from alloc_moe.compiler import compile


@pytest.mark.slow
def test_every_text_has_its_row(
    load: Callable[[str], ModuleType],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    held = load("benchmarks/quality/held")
    monkeypatch.setattr(held, "TOKENS", 128)  # the context of the model
    monkeypatch.setattr(held, "WINDOW", 64)
    monkeypatch.setattr(held, "POSITIONS", 2)
    model = checkpoint("olmoe")
    artifact = compile(str(model), budget=0.5, output=tmp_path / "out.onnx", tokens=256).path
    report = tmp_path / "held.csv"
    options = [str(artifact), "--text", str(model / "calibration.txt"), "--report", str(report)]
    outcome = CliRunner().invoke(held.main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split(" | ") for line in outcome.stdout.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows] == ["text", *held.KINDS]
    with report.open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == len(held.KINDS) * len(held.WAYS) * 2
    own = [float(run["experts"]) for run in runs if run["way"] == "own"]
    assert sum(own) / len(own) == pytest.approx(1, abs=0.05)
    decoded = [float(run["experts"]) for run in runs if run["way"] == "decoded"]
    assert decoded == pytest.approx([1.0] * len(decoded), abs=0.05)
