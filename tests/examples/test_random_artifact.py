"""Artifacts of random weights, loading them, and the table of precisions, on tiny shapes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.execution.session import open_session

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return what imports a benchmark as it imports its neighbours; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def test_a_random_artifact_runs_what_its_dial_says(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = load("random_artifact")
    config = made.configuration(load("shapes").SHAPES["tiny"])
    path = tmp_path / "tiny.onnx"
    options = {"dtype": "int4", "block": 128, "cache": "int8"}
    made.write(config, path, **options, also=["none", "float32-cache"])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 128))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["tiny-float32-cache.onnx", "tiny-none.onnx", "tiny.onnx", "tiny.onnx.data"]
    for name in ("tiny.onnx", "tiny-float32-cache.onnx"):
        session = open_session(tmp_path / name, ep="cpu", count_activations=True)
        output = session.run(tokens, price=price_of(session.plan, "0.5"))
        assert sum(output.activations or ()) / tokens.size == pytest.approx(8, abs=0.2)
    uniform = open_session(tmp_path / "tiny-none.onnx", ep="cpu", count_activations=True)
    assert uniform.run(tokens).activations == (2 * 128,) * 4

    loading = load("loading")
    outcome = CliRunner().invoke(loading.main, [str(path), "--runs", "1"])
    assert outcome.exit_code == 0, outcome.output
    assert "first token after" in outcome.output

    options = [str(path), "--runs", "2", "--past", "20", "--budget", "0.5"]
    outcome = CliRunner().invoke(load("operators").main, options)
    assert outcome.exit_code == 0, outcome.output
    assert "| QMoE |" in outcome.output


@pytest.mark.slow
def test_the_table_of_precisions_has_a_row_per_type(
    load: Callable[[str], ModuleType], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, dtype=np.uint8).tobytes())
    sizes = ["--text-tokens", "512", "--tokens", "256", "--budget", "0.5"]
    main = load("precision").main
    outcome = CliRunner().invoke(main, [str(checkpoint("olmoe")), "--text", str(text), *sizes])
    assert outcome.exit_code == 0, outcome.output
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[3].strip() for row in rows] == ["float32", "int8", "int4"]
    divergences = [float(row.split("|")[6]) for row in rows]
    assert divergences[0] == 0 < divergences[1] < divergences[2]


def test_kernels_are_timed_whole_and_in_halves(load: Callable[[str], ModuleType]) -> None:
    options = ["--shape", "tiny", "--tokens", "4", "--runs", "1"]
    outcome = CliRunner().invoke(load("quantized_kernels").main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("|")[1].strip() for line in outcome.stdout.splitlines() if "|" in line]
    assert rows == ["block", "---:", "32", "64", "experts", "---:", "1", "2", "3", "4"]
