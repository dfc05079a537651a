"""Plans of equal bytes: a row per way, and nothing where no plan is so small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner


@pytest.mark.slow
def test_a_way_has_a_cell_per_target(
    load: Callable[[str], ModuleType], examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier = load("benchmarks/quality/frontier")
    (way,) = [way for way in frontier.WAYS if way.name == "int8, threshold"]
    monkeypatch.setattr(frontier, "WAYS", (way,))
    arguments = [str(examples / "tiny-qwen3-moe"), "--targets", "0.6MB,1.5MB", "--seed", "0"]
    few = ["--tokens", "512", "--text-tokens", "512"]
    outcome = CliRunner().invoke(frontier.main, [*arguments, *few], catch_exceptions=False)
    assert outcome.exit_code == 0
    name, small, large = outcome.stdout.splitlines()[-1].strip("|").split("|")
    assert name.strip() == way.name
    assert small.strip() == "-"
    assert 0 < float(large.split()[0]) < 1
