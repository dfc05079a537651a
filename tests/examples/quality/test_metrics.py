"""The tables of what metrics predict, on a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner, Result


@pytest.fixture
def metrics(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks/quality/metrics")


@pytest.fixture
def run(
    metrics: ModuleType, checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[..., Result]:
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 5000, dtype=np.uint8).tobytes())

    def invoke(*options: str) -> Result:
        sizes = [
            "--tokens",
            "256",
            "--text-tokens",
            "256",
            "--plans",
            "12",
            "--budgets",
            "0.5,0.75",
        ]
        path = ["-o", str(tmp_path / "metrics.json"), "--text", str(text)]
        return CliRunner().invoke(metrics.main, [str(checkpoint("olmoe")), *path, *sizes, *options])

    return invoke


@pytest.mark.parametrize("redistribution", ["none", "sequence"])
def test_metrics_ranks_random_plans(
    run: Callable[..., Result], tmp_path: Path, redistribution: str
) -> None:
    outcome = run("--redistribute", redistribution)
    assert outcome.exit_code == 0, outcome.output
    rows = [line for line in outcome.stdout.splitlines() if line.startswith("|")]
    names = [row.split(" | ")[0].strip("| ") for row in rows]
    table = ["kl", "ppl-suffix", "output", "fisher", "data-free"]
    assert names[2:8] == [*table, "activations alone"]
    assert names[10:] == [*table, "uniform k", "best random plan"]
    losses = json.loads((tmp_path / "metrics.json").read_text())["losses"]
    assert "4 4 4" in losses
    assert len(losses) > 8
    again = run("--redistribute", redistribution)
    assert again.stdout == outcome.stdout


def test_metrics_compares_ways_to_measure(run: Callable[..., Result], tmp_path: Path) -> None:
    options = ["--redistribute", "sequence", "--correct", "affine", "--metrics", "output,fisher"]
    outcome = run(*options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split(" | ") for line in outcome.stdout.splitlines() if line.startswith("|")]
    ways = ["neither", "sequence", "sequence + affine"]
    expected = [["| " + metric, way] for metric in ("output", "fisher") for way in ways]
    assert [row[:2] for row in rows[2:]] == [*expected, ["| uniform k", ""]]
    for way in ("none.none", "sequence.none", "sequence.affine"):
        assert (tmp_path / f"metrics.fisher.{way}.json").is_file()
    assert run(*options).stdout == outcome.stdout
    assert run(*options[:3], "gain").exit_code == 1  # of other settings


def test_metrics_refuses_results_of_other_settings(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "metrics.json").write_text('{"settings": {}, "losses": {}}')
    outcome = run()
    assert outcome.exit_code == 1
    assert "has the results of other settings" in str(outcome.exception)


def test_random_plans_spend_their_budget(metrics: ModuleType) -> None:
    random = np.random.default_rng(0)
    plans = [metrics.random_plan(random, [4, 8, 2], 9) for _ in range(50)]
    assert {sum(plan) for plan in plans} == {9}
    assert all(1 <= k <= most for plan in plans for k, most in zip(plan, [4, 8, 2], strict=True))
    assert len({tuple(plan) for plan in plans}) > 5
