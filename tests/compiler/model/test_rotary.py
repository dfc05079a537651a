"""Rotary embeddings that depend on the text's length, as a function of positions alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.export.normalize import export_model
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.skeleton import build_empty, forget_earlier_lengths
from alloc_moe.runtime.artifact.plan import AllocationPlan
from alloc_moe.runtime.execution.session import open_session

TRAINED = 16


@pytest.fixture
def dynamic(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint trained on 16 positions that stretches its frequencies for longer texts."""
    model = checkpoint("qwen3_moe", num_hidden_layers=1)
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = TRAINED
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fresh(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("mode", ["never", "always"])
def test_any_order_of_texts_gives_what_a_fresh_model_gives(dynamic: Path, mode: Any) -> None:
    moe = load_model(str(dynamic), offload=mode)
    for length in (8, 17, 60, 16, 30):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            expected = fresh(dynamic)(input_ids=ids).logits
            assert torch.equal(moe.model(input_ids=ids).logits, expected), length


def test_the_artifact_continues_a_text_over_the_trained_length(
    dynamic: Path, plan_for: Callable[..., AllocationPlan], written: Callable[..., Path]
) -> None:
    moe = load_model(str(dynamic))
    plan = plan_for(moe, [4], redistribution="none")
    session = open_session(written(export_model(moe, dtype="float32"), plan), ep="cpu", threads=1)
    model = fresh(dynamic)
    ids = np.arange(3, 31)[None]
    cut = TRAINED - 4
    output, cache = session.run(ids[:, :cut]), None
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids[:, :cut]), use_cache=True)
        for position in range(cut, ids.shape[1]):
            np.testing.assert_allclose(
                output.logits[:, -1], expected.logits[:, -1].numpy(), atol=1e-4
            )
            token = ids[:, position : position + 1]
            cache = output.cache
            output = session.run(token, cache=cache)
            expected = model(
                input_ids=torch.from_numpy(token), past_key_values=expected.past_key_values
            )


def test_other_types_are_left_alone() -> None:
    config = AutoConfig.for_model("mixtral", hidden_size=32, num_hidden_layers=1, vocab_size=8)
    model = build_empty(config, torch.float32)
    assert "forward" not in vars(model.model.rotary_emb)


def test_types_that_differ_by_layer_are_refused() -> None:
    config = AutoConfig.for_model("mixtral", hidden_size=32, num_hidden_layers=1, vocab_size=8)
    model = build_empty(config, torch.float32)
    model.model.rotary_emb.rope_type = {"full_attention": "dynamic"}
    with pytest.raises(UnsupportedModelError, match="mixtral has rotary embeddings of type dynam"):
        forget_earlier_lengths(model)
