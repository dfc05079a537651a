"""The bundled models' training runs, for seconds and on a few words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize(
    ("family", "experts_per_token"),
    [("olmoe", [8] * 6), ("qwen3_moe", [8] * 5), ("qwen2_moe", [4] * 6)],
)
def test_training_makes_a_model_that_loads(
    examples: Path, tmp_path: Path, family: str, experts_per_token: list[int]
) -> None:
    from alloc_moe.compiler.model.loading import load_model

    words = ["experts", "router", "layer", "token", "the", "of", "a", "few", "are", "enough"]
    random = Random(0)
    documents = [" ".join(random.choices(words, k=180)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    command = [sys.executable, examples / "training" / "train.py", "--text", "text.txt"]
    options = ["--work", "work", "--out", "out", "--minutes", "0.05", "--vocab-size", "300"]
    options += ["--family", family]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    moe = load_model(str(tmp_path / "out"))
    assert moe.config.model_type == family
    assert [layer.experts_per_token for layer in moe.layers] == experts_per_token
