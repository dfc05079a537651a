"""Every numbered example runs as written, on a small model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """Import a script, whose name need not be an identifier."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compile_and_generate(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load("01_compile_and_generate.py").main
    main(str(checkpoint("olmoe")), f"{tmp_path / 'half'}/", tokens=256, new_tokens=4)
    printed = capsys.readouterr().out
    assert "Experts per layer: [" in printed
    assert "'In the beginning' -> " in printed
    assert (tmp_path / "half" / "genai_config.json").is_file()


def test_many_budgets(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("02_many_budgets.py").main(str(checkpoint("olmoe")), str(tmp_path), tokens=256)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["0.375", "0.5", "0.75"]
    assert {path.name for path in tmp_path.glob("*.onnx")} == {
        f"budget-{budget}.onnx" for budget in ("0.375", "0.5", "0.75")
    }


@pytest.mark.slow
def test_training_makes_a_model_that_loads(tmp_path: Path) -> None:
    from alloc_moe.compiler.load import load_model

    words = ["experts", "router", "layer", "token", "the", "of", "a", "few", "are", "enough"]
    random = Random(0)
    documents = [" ".join(random.choices(words, k=180)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    command = [sys.executable, EXAMPLES / "train_tiny_moe.py", "--text", "text.txt"]
    options = ["--work", "work", "--out", "out", "--minutes", "0.05", "--vocab-size", "300"]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    moe = load_model(str(tmp_path / "out"))
    assert [layer.experts_per_token for layer in moe.layers] == [8] * 6


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("[0-9]*.py")}
    assert names == {"01_compile_and_generate.py", "02_many_budgets.py"}
