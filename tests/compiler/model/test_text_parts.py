"""The language model of a checkpoint that also takes images computes what the whole computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Mistral3ForConditionalGeneration,
    PreTrainedConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.records import OffloadMode


def test_the_text_part_of_a_model_that_takes_images_is_loaded(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = checkpoint("qwen3_5_moe_text")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    sizes |= {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    config = AutoConfig.for_model(
        "qwen3_5_moe",
        text_config=AutoConfig.from_pretrained(text).to_dict(),
        vision_config=sizes,
        tie_word_embeddings=False,
    )
    original = _saved(Qwen3_5MoeForConditionalGeneration, config, text, tmp_path)
    moe = load_model(str(tmp_path))
    _assert_same_logits(moe.model, original)
    (note,) = moe.checkpoint.notes
    assert "belong to no weight and are left out: model.visual.blocks.0" in note


@pytest.mark.parametrize("offload", ["never", "always"])
def test_a_text_part_that_is_another_family_computes_the_same(
    checkpoint: Callable[[str], Path], offload: OffloadMode
) -> None:
    folder = checkpoint("qwen3_vl_moe")
    moe = load_model(str(folder), offload=offload)
    assert moe.config.model_type == "qwen3_moe"
    original = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    _assert_same_logits(moe.model, original.eval())
    assert any("are left out: model.visual." in note for note in moe.checkpoint.notes)


def test_a_text_part_keeps_the_ties_of_the_whole(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = checkpoint("mistral4")
    config = AutoConfig.for_model(
        "mistral3",
        text_config=AutoConfig.from_pretrained(text).to_dict() | {"tie_word_embeddings": False},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        tie_word_embeddings=True,
    )
    original = _saved(Mistral3ForConditionalGeneration, config, text, tmp_path)
    moe = load_model(str(tmp_path))
    assert moe.config.model_type == "mistral4"
    _assert_same_logits(moe.model, original)
    assert any("are left out: multi_modal" in note for note in moe.checkpoint.notes)


def _saved(kind: Any, config: PreTrainedConfig, text: Path, folder: Path) -> torch.nn.Module:
    """Write a random model of a class into a folder, with the tokenizer beside `text`."""
    torch.manual_seed(0)
    original: torch.nn.Module = kind._from_config(config, dtype=torch.float32).eval()
    original.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, folder)
    return original


def _assert_same_logits(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
