"""The tables of calibration texts, on a small random model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner


@pytest.fixture
def calibration(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks/quality/calibration")


def test_texts_are_calibrated_on_and_scored_in_other_halves(
    calibration: ModuleType, examples: Path, tmp_path: Path
) -> None:
    calibration.write_texts(examples / "tiny-moe", tmp_path)
    for kind in calibration.KINDS:
        halves = [
            (tmp_path / f"{kind}.{half}.txt").read_text() for half in ("calibration", "heldout")
        ]
        assert min(map(len, halves)) > 100_000
        assert halves[0][:2000] not in halves[1]


@pytest.mark.slow
def test_every_draw_has_its_runs(
    calibration: ModuleType,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)

    def write(model: Path, folder: Path) -> None:
        for kind in calibration.KINDS:
            for half in ("calibration", "heldout"):
                letters = random.integers(97, 122, 700, dtype=np.uint8).tobytes()
                (folder / f"{kind}.{half}.txt").write_bytes(letters)

    monkeypatch.setattr(calibration, "write_texts", write)
    model = shutil.copytree(checkpoint("olmoe"), tmp_path / "small")
    report = tmp_path / "runs.csv"
    sizes = ["--tokens", "192", "--curve", "64,192", "--text-tokens", "128", "--seeds", "1"]
    command = [str(model), "--report", str(report), *sizes, "--budget", "0.5"]
    outcome = CliRunner().invoke(calibration.main, command)
    assert outcome.exit_code == 0, outcome.output
    rows = [
        line.strip("| ").split(" | ") for line in outcome.stdout.splitlines() if line[:1] == "|"
    ]
    compared = [row[2:4] for row in rows[2:11]]
    assert compared == [
        [text, name] for text in calibration.KINDS for name in ("built-in", "mixture", text)
    ]
    assert [row[:3] for row in rows[13:]] == [["small", "0.5", "64"], ["small", "0.5", "192"]]
    assert {row[-1] for row in (*rows[2:11], *rows[13:])} == {"1"}
    runs = calibration.read(report)
    assert len(runs) == 3 + 3 + 3 + 1
    assert min(run.divergence for run in runs) > 0
    assert [run.experts for run in runs] == pytest.approx([6.0] * len(runs), abs=2)
    before = report.read_bytes()
    again = CliRunner().invoke(calibration.main, command)
    assert (again.stdout, report.read_bytes()) == (outcome.stdout, before)
