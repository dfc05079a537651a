"""Configurations that contradict themselves or the weights are refused before anything is built."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import AllocMoeError, CheckpointError
from alloc_moe.compiler.model import checkpoint as checkpoint_module
from alloc_moe.compiler.model.checkpoint import open_checkpoint


def configure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers in config.json is 100000, not a whole"),
        ({"num_hidden_layers": 10_000}, "is 10000, but the weights in .* hold 3 layers"),
        ({"num_hidden_layers": 4}, "is 4, but the weights in .* hold 3 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0, not a positive"),
        ({"num_hidden_layers": -3}, "num_hidden_layers in config.json is -3, not a whole"),
        ({"num_hidden_layers": "3"}, 'num_hidden_layers in config.json is "3", not a positive'),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers in config.json is 2.5, not a whole"),
        ({"num_labels": 100_000_000}, "num_labels in config.json is 100000000, not a whole number"),
        (
            {"vocab_size": 400},
            r"vocab_size in config.json is 400, but .* has the shape \[288, 64\]",
        ),
        ({"vocab_size": 10**12}, "vocab_size in config.json is 1000000000000, not a whole number"),
        ({"hidden_size": 32}, r"hidden_size in config.json is 32, but .* has the shape \[288, 64"),
        ({"num_experts": 16}, "num_experts in config.json is 16, but the weights hold 8 experts"),
        ({"num_experts": 10**6}, "num_experts in config.json is 1000000, not a whole number"),
        (
            {"num_experts_per_tok": 9},
            r"num_experts_per_tok in config.json is 9, but there are 8 ex",
        ),
        (
            {"num_experts_per_tok": 0},
            r"num_experts_per_tok in config.json is 0, but there are 8 ex",
        ),
        ({"num_attention_heads": 5}, "hidden_size 64 in config.json can't be divided by .* 5"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0; it must be posit"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 .* divided by num_key_value_heads 3"),
        ({"intermediate_size": 1 << 40}, "intermediate_size in config.json is 1099511627776, not"),
        ({"text_config": {"num_labels": 1 << 40}}, "num_labels in config.json is 1099511627776"),
        ({"max_position_embeddings": 1}, "max_position_embeddings in config.json is 1; with fewer"),
        ({"eos_token_id": 10**30}, r"eos_token_id in config.json is 10+, which is absurd"),
    ],
)
def test_a_wrong_size_is_named_before_anything_is_built(
    copy: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(
        checkpoint_module, "build_skeleton_or_refuse", lambda *_, **__: pytest.fail("built")
    )
    configure(copy, **entries)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(copy))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_act": "no such thing"},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"num_experts": None},
        {"rms_norm_eps": "small"},
        {"layer_types": ["full_attention"] * 7},
        {"dtype": "float7"},
        {"architectures": 3},
    ],
)
def test_a_wrong_setting_is_no_traceback(copy: Path, entries: dict[str, Any]) -> None:
    configure(copy, **entries)
    with contextlib.suppress(AllocMoeError):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 99_999, b'{"a": NaN}'])
def test_a_configuration_that_is_no_object_is_reported(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON object that can be read"):
        open_checkpoint(str(copy))


def test_a_huge_configuration_is_not_read(copy: Path) -> None:
    with (copy / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes, more than"):
        open_checkpoint(str(copy))


def test_experts_of_different_shapes_are_reported(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"can't be joined into model\.layers\.1\.mlp\.exp"):
        open_checkpoint(str(copy))
