"""A configuration chooses no kernels and no outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations import hub_kernels

from alloc_moe.compiler.model.checkpoint import open_checkpoint, read_config
from alloc_moe.compiler.model.checks.pinning import pin_settings
from alloc_moe.compiler.model.loading import load_model


def configure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "owner/name"},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": {"": "owner/name"}},
        {"_attn_implementation": "owner/name"},
        {"_attn_implementation_internal": "owner/name"},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": 3},
        {"experts_implementation": "owner/name"},
        {"_experts_implementation": "deepgemm"},
    ],
)
@pytest.mark.parametrize("mode", ["never", "always"])
def test_no_kernel_is_fetched(
    copy: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, Any], mode: Any
) -> None:
    monkeypatch.setattr(
        hub_kernels, "load_and_register_attn_kernel", lambda *_, **__: pytest.fail("fetched")
    )
    monkeypatch.setattr(
        "transformers.modeling_utils.load_and_register_attn_kernel",
        lambda *_, **__: pytest.fail("fetched"),
        raising=False,
    )
    configure(copy, **entries)
    moe = load_model(str(copy), offload=mode)
    for model in (moe.model, moe.checkpoint.skeleton):
        assert model.config._attn_implementation == "sdpa"
    assert moe.model.get_experts_implementation() != "owner/name"


def test_configurations_within_a_configuration_are_pinned() -> None:
    config = AutoConfig.for_model("qwen3_5_moe")
    config._attn_implementation = {"": "owner/name", "text_config": "owner/other"}
    config.text_config.use_cache = False
    pin_settings(config)
    parts = (config, config.text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == [None] * 3
    assert config.text_config.use_cache is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", False),
        ("output_router_logits", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
    ],
)
@pytest.mark.parametrize("mode", ["never", "always"])
def test_flags_of_training_change_nothing(copy: Path, name: str, value: bool, mode: Any) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load_model(str(copy)).model(input_ids=ids)
        configure(copy, **{name: value})
        moe = load_model(str(copy), offload=mode)
        actual = moe.model(input_ids=ids)
    assert torch.equal(actual.logits, expected.logits)
    assert actual.past_key_values is not None
    assert actual.keys() == expected.keys()
    skeleton = moe.checkpoint.skeleton.config
    assert getattr(skeleton, name) is not value


def test_a_configuration_without_flags_stays_as_it_is(copy: Path) -> None:
    before = AutoConfig.from_pretrained(copy).to_dict()
    assert read_config(copy).to_dict() == before
    assert open_checkpoint(str(copy)).config.to_dict() == before
