"""Latent attention alone, in the ways that were tried."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from click.testing import CliRunner


def test_all_ways_are_timed_after_every_past(speed: Callable[[str], ModuleType]) -> None:
    options = ["--layers", "1", "--past", "8", "--past", "16", "--runs", "1", "--threads", "1"]
    outcome = CliRunner().invoke(speed("latent_attention").main, options)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("|")[1:-1] for line in outcome.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["a layer, ms", "past 8", "past 16"]
    assert len(rows[2:]) == 4
    assert all(float(cell.split()[0]) > 0 for row in rows[2:] for cell in row[1:])


def test_a_shape_may_be_that_of_a_model_with_fewer_layers(
    speed: Callable[[str], ModuleType],
) -> None:
    shaped = speed("random_artifact").shaped
    config = shaped("DeepSeek-V2-Lite", layers=2)
    assert (config.model_type, config.num_hidden_layers) == ("deepseek_v2", 2)
    assert config.kv_lora_rank == 512
    assert shaped("tiny", layers=None).num_hidden_layers == 4
