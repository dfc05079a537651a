"""The table of llama.cpp's formats beside ours, where llama.cpp is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from alloc_moe.compiler.model.loading import load_model

MODELS = ("tiny-moe", "tiny-qwen2-moe", "tiny-qwen3-moe")


@pytest.fixture
def table(load: Callable[[str], ModuleType]) -> ModuleType:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason=f"{package} isn't installed")
    return load("benchmarks/quality/against_llama_cpp")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_every_weight_and_gives_it_back(
    table: ModuleType, examples: Path, name: str, tmp_path: Path
) -> None:
    moe = load_model(str(examples / name))
    before = {each: value.detach().clone() for each, value in moe.model.named_parameters()}
    path = tmp_path / "f16.gguf"
    table.write_gguf(moe, path)
    with torch.no_grad():
        for value in moe.model.parameters():
            value.zero_()
        table.read_into(moe, path)
        for each, value in moe.model.named_parameters():
            torch.testing.assert_close(value, before[each], rtol=1e-3, atol=1e-6)


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
    formats = [f"{name}{end}" for name in table.FORMATS for end in ("", " with importance")]
    assert [row[1] for row in rows] == ["int4, nearest", "int4, gptq", "F16", *formats]
    computed = float(rows[2][6].strip(" |"))
    assert computed < 1e-3


@torch.inference_mode()
def test_importance_is_the_mean_square_of_what_enters(table: ModuleType, examples: Path) -> None:
    moe = load_model(str(examples / "tiny-qwen2-moe"))
    ids = np.random.default_rng(0).integers(0, moe.config.vocab_size, (2, 16))
    importance = table.Importance(moe, ids)
    found = {
        entry.name.decode(): np.ctypeslib.as_array(entry.data, (entry.size,))
        for entry in list(importance.entries())[:-1]
    }
    names = {name for name, weight in table.tensors(moe.model) if weight.dim() > 1}
    kept = ("token_embd.weight", "ffn_gate_inp.weight")  # read by row, and not rounded
    assert {name for name in names if not name.endswith(kept)} <= found.keys()
    squares: list[torch.Tensor] = []
    head: Any = moe.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: squares.append(given[0].square()))
    moe.model(input_ids=torch.from_numpy(ids))
    expected = torch.cat(squares).flatten(0, -2).mean(0).numpy()
    np.testing.assert_allclose(found["output.weight"], expected, rtol=1e-4)
    experts = found["blk.0.ffn_gate_exps.weight"].reshape(moe.layers[0].num_experts, -1)
    assert len(np.unique(experts.round(6), axis=0)) > 1
