"""The table of llama.cpp's formats beside ours, where llama.cpp is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from alloc_moe.compiler.model.loading import load_model

FAMILIES = ("olmoe", "qwen3_moe")


@pytest.fixture
def table(load: Callable[[str], ModuleType]) -> ModuleType:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason=f"{package} isn't installed")
    return load("benchmarks/quality/against_llama_cpp")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_every_weight_and_gives_it_back(
    table: ModuleType, checkpoint: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    moe = load_model(str(checkpoint(family)))
    before = {name: value.detach().clone() for name, value in moe.model.named_parameters()}
    path = tmp_path / "f16.gguf"
    table.write_gguf(moe, path)
    with torch.no_grad():
        for value in moe.model.parameters():
            value.zero_()
        table.read_into(moe, path)
        for name, value in moe.model.named_parameters():
            torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_every_format_has_its_row_and_float16_is_computed_alike(
    table: ModuleType, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, dtype=np.uint8).tobytes())
    given = [str(checkpoint("olmoe")), "--text", str(text), "--text-tokens", "512"]
    outcome = CliRunner().invoke(table.main, [*given, "--tokens", "256"])
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split(" | ") for line in outcome.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["int4, nearest", "int4, gptq", "F16", *table.FORMATS]
    computed = float(rows[2][6].strip(" |"))
    assert computed < 1e-3
