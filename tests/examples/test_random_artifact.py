"""Artifacts of random weights, loading them, and where their time goes, on a tiny shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from alloc_moe.runtime.artifact.dial import price_of
from alloc_moe.runtime.execution.session import open_session

LAYERS = 2  # of the shape's four: the time goes into capturing them


def test_a_random_artifact_runs_what_its_dial_says(
    speed: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    made = speed("random_artifact")
    config = made.shaped("tiny", layers=LAYERS)
    path = tmp_path / "tiny.onnx"
    options = {"dtype": "int4", "block": 128, "cache": "int8"}
    made.write(config, path, **options, also=["none", "float32-cache"])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 128))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["tiny-float32-cache.onnx", "tiny-none.onnx", "tiny.onnx", "tiny.onnx.data"]
    for name in ("tiny.onnx", "tiny-float32-cache.onnx"):
        session = open_session(tmp_path / name, ep="cpu", count_activations=True)
        output = session.run(tokens, price=price_of(session.plan, "0.5"))
        assert sum(output.activations or ()) / tokens.size == pytest.approx(2 * LAYERS, abs=0.15)
    uniform = open_session(tmp_path / "tiny-none.onnx", ep="cpu", count_activations=True)
    assert uniform.run(tokens).activations == (2 * 128,) * LAYERS

    loading = speed("loading")
    outcome = CliRunner().invoke(loading.main, [str(path), "--runs", "1"])
    assert outcome.exit_code == 0, outcome.output
    assert "first token after" in outcome.output

    options = [str(path), "--runs", "2", "--past", "20", "--budget", "0.5"]
    outcome = CliRunner().invoke(speed("operators").main, options)
    assert outcome.exit_code == 0, outcome.output
    assert "| QMoE |" in outcome.output


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_graphs_without_data_run_with_weights_filled_in(
    speed: Callable[[str], ModuleType], tmp_path: Path, dtype: str
) -> None:
    made = speed("random_artifact")
    config = made.shaped("tiny", layers=LAYERS)
    path = tmp_path / "tiny.onnx"
    options = {"dtype": dtype, "block": 128, "cache": "float32"}
    made.write(config, path, **options, also=["full"], device="cuda", data=False)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["tiny-full.onnx", "tiny.onnx", "tiny.onnx.weights.json"]
    speed("random_models/without_data").fill(tmp_path / "tiny.onnx.weights.json")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 16))
    free, full = (
        open_session(tmp_path / name, ep="cpu").run(tokens, price=price).logits
        for name, price in (("tiny.onnx", 0.0), ("tiny-full.onnx", None))
    )
    assert np.ptp(full.astype(np.float32)) > 0.1
    np.testing.assert_allclose(free, full, atol=2e-2)


def test_a_shape_may_be_that_of_a_model_with_fewer_layers(
    speed: Callable[[str], ModuleType],
) -> None:
    shaped = speed("random_artifact").shaped
    config = shaped("DeepSeek-V2-Lite", layers=2)
    assert (config.model_type, config.num_hidden_layers) == ("deepseek_v2", 2)
    assert config.kv_lora_rank == 512
    assert shaped("tiny", layers=None).num_hidden_layers == 4
