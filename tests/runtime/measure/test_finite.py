"""Logits that are no numbers end no command well."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from alloc_moe.compiler.commands.alloc_eval import eval_command
from alloc_moe.runtime.commands.alloc_bench import bench_command
from alloc_moe.runtime.commands.alloc_run import run_command
from alloc_moe.runtime.measure.evaluate import Evaluation


@pytest.fixture(params=[np.nan, np.inf, -np.inf])
def broken(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose last weights are no numbers."""
    model = onnx.load(bundle / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            array = numpy_helper.to_array(tensor).copy()
            array[0, :] = request.param
            tensor.CopyFrom(numpy_helper.from_array(array, "head"))
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        shutil.copy(bundle / name, tmp_path)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "text.txt").write_text("The committee")
    return tmp_path


@pytest.mark.parametrize("command", ["run", "drawn", "eval", "bench"])
def test_no_command_ends_well(broken: Path, command: str) -> None:
    commands = {
        "run": (run_command, ["--prompt", "a", "--max-new-tokens", "2"]),
        "drawn": (run_command, ["--prompt", "a", "--max-new-tokens", "2", "--temperature", "1"]),
        "eval": (eval_command, ["--text", str(broken / "text.txt")]),
        "bench": (bench_command, ["--prompt-tokens", "2", "--past", "1", "--runs", "1"]),
    }
    function, options = commands[command]
    outcome = CliRunner().invoke(function, [str(broken), "--ep", "cpu", *options])
    assert outcome.exit_code == 1, outcome.output
    assert "that are no finite numbers" in outcome.stderr
    assert "Perplexity" not in outcome.stdout


def test_a_perplexity_is_no_number_where_the_loss_is_none() -> None:
    assert math.isnan(Evaluation(math.nan, 1, 1, 2, 1).perplexity)
    assert Evaluation(1000.0, 1, 1, 2, 1).perplexity == math.inf
    assert Evaluation(0.0, 1, 1, 2, 1).perplexity == 1
