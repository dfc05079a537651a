from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from alloc_moe.compiler.errors import CheckpointError, UnsupportedModelError
from alloc_moe.compiler.model import checkpoint as checkpoint_module
from alloc_moe.compiler.model.checkpoint import read_config, resolve_folder
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_layers import find_moe_layers
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.skeleton import build_skeleton

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def folder_of(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a configuration, and a file of weights that holds nothing of use."""
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "blocks", "decoder_layers", "experts_per_token"),
    [
        ("olmoe", "mlp", [0, 1, 2], 4),
        ("mixtral", "mlp", [0, 1], 2),
        ("qwen2_moe", "mlp", [0, 2, 3], 4),
        ("qwen3_moe", "mlp", [0, 1, 2], 4),
        ("deepseek_v2", "mlp", [1, 2], 4),
        ("gpt_oss", "mlp", [0, 1], 4),
    ],
)
def test_moe_layers_are_found(
    moe_model: Callable[[str], MoeModel],
    family: str,
    blocks: str,
    decoder_layers: list[int],
    experts_per_token: int,
) -> None:
    layers = moe_model(family).layers
    assert [layer.decoder_layer for layer in layers] == decoder_layers
    assert [layer.name for layer in layers] == [
        f"model.layers.{index}.{blocks}" for index in decoder_layers
    ]
    assert all(layer.experts_name == f"{layer.name}.experts" for layer in layers)
    assert {layer.num_experts for layer in layers} == {8}
    assert {layer.experts_per_token for layer in layers} == {experts_per_token}


def test_the_model_is_loaded_in_float32_to_be_read_only(
    moe_model: Callable[[str], MoeModel],
) -> None:
    moe = moe_model("olmoe")
    assert not moe.model.training
    assert {parameter.dtype for parameter in moe.model.parameters()} == {torch.float32}
    assert moe.checkpoint.folder == Path(moe.checkpoint.source)
    # Storage of the skeleton: one zero per parameter.
    sizes = [
        parameter.untyped_storage().nbytes() for parameter in moe.checkpoint.skeleton.parameters()
    ]
    assert max(sizes) == 4


def test_loading_prints_nothing(
    checkpoint: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(str(checkpoint("mixtral")))
    assert capfd.readouterr() == ("", "")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "llama", **TINY)
    with pytest.raises(UnsupportedModelError, match="llama is a dense model: it has no routed exp"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4", "it routes each token to one expert, so there is nothing to allocate"),
        ("llama4_text", "it routes each token .* its rotary embedding uses complex numbers"),
        ("dbrx", "transformers keeps the experts of its layers in one matrix"),
        ("glm_moe_dsa", "its layers of type indexed_attention keep other states than keys and val"),
        ("minimax", "its lightning attention keeps states in a way of its own"),
    ],
)
def test_what_is_known_not_to_work_is_refused(tmp_path: Path, model_type: str, reason: str) -> None:
    folder_of(tmp_path, model_type)
    with pytest.raises(UnsupportedModelError, match=f"{model_type} can't be compiled: {reason}"):
        load_model(str(tmp_path))


def test_a_model_that_does_not_run_as_configured_is_refused(
    checkpoint: Callable[..., Path],
) -> None:
    # Keys of two heads, but queries that expect one for each of the four.
    folder = checkpoint("bailing_hybrid", num_key_value_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"but can't run it: The size of tensor a"):
        load_model(str(folder))


def test_text_models_that_are_none_by_themselves_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "ernie4_5_vl_moe")
    with pytest.raises(UnsupportedModelError, match="ernie4_5_vl_moe takes images beside text"):
        load_model(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "t5", d_model=16, num_layers=1)
    with pytest.raises(UnsupportedModelError, match="t5 is no causal language model"):
        load_model(str(tmp_path))


def test_experts_with_another_gate_are_refused() -> None:
    config = AutoConfig.for_model("olmoe", **TINY, hidden_act="gelu", num_experts=4)
    with pytest.raises(
        UnsupportedModelError,
        match=r"olmoe's experts \(model\.layers\.0\.mlp\.experts\) compute GELU.*gated by SiLU",
    ):
        find_moe_layers(build_skeleton(config, torch.float32))


def test_the_gate_of_gemma_4_is_refused(tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    folder_of(tmp_path, "gemma4_text", **TINY, **experts, head_dim=8, moe_intermediate_size=8)
    with pytest.raises(UnsupportedModelError, match=r"gemma4_text's experts .* compute GELUTanh"):
        load_model(str(tmp_path))


def test_experts_that_are_not_fused_are_refused() -> None:
    class OldMoeBlock(torch.nn.Module):
        pass

    model = build_skeleton(AutoConfig.for_model("llama", **TINY), torch.float32)
    model.add_module("block", OldMoeBlock())
    with pytest.raises(
        UnsupportedModelError, match=r"The experts of llama \(OldMoeBlock\) don't f"
    ):
        find_moe_layers(model)


def test_a_router_of_one_expert_leaves_nothing_to_allocate() -> None:
    config = AutoConfig.for_model("olmoe", **TINY, num_experts=4, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match="Every token activates 1 expert per layer"):
        find_moe_layers(build_skeleton(config, torch.float32))


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    AutoConfig.for_model("olmoe", **TINY).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no safetensors weights"):
        load_model(str(tmp_path))


def test_a_folder_without_configuration_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no checkpoint"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["not json", '{"model_type": "nonsense"}', "{}", '{"model_type": 3}']
)
def test_a_configuration_that_is_none_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"transformers can't read .*config\.json: \S"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "source", ["./models/olmoe", "./olmoe", "../olmoe", "/no/such/folder", "olmoe", "a/b/c"]
)
def test_a_path_that_is_not_there_is_never_downloaded(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded")
    )
    with pytest.raises(CheckpointError, match=f"{source!r} is neither a folder nor a model id"):
        resolve_folder(source)


def test_a_hub_id_is_downloaded_without_pickled_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(source: str, *, allow_patterns: list[str]) -> str:
        asked.append((source, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_folder("owner/name") == tmp_path
    [(source, patterns)] = asked
    assert source == "owner/name"
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern or "pt" in pattern for pattern in patterns)


def test_an_id_that_the_hub_forbids_is_reported() -> None:
    with pytest.raises(CheckpointError, match=r"no folder 'owner/a--b', and the hub .*Cannot have"):
        resolve_folder("owner/a--b")


def test_a_hub_id_without_network_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("An error happened.\nMore lines.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        CheckpointError, match=r"no folder 'owner/name', and the hub .* \(An error happened\.\)"
    ):
        resolve_folder("owner/name")


def test_a_missing_tokenizer_is_reported(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer: none of merges\.txt, tokenizer\.json"
    ):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_in_two_files_is_converted(copy: Path, tmp_path: Path, kind: str) -> None:
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    before = load_model(str(copy)).checkpoint.tokenizer("a text of bytes: \u00e9").input_ids
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "merges.txt").write_text("#version: 0.2\n")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    checkpoint = load_model(str(copy)).checkpoint
    [note] = checkpoint.notes
    assert "has no tokenizer.json" in note
    checkpoint.tokenizer.save_pretrained(tmp_path / "bundle")
    converted = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert converted.encode("a text of bytes: \u00e9").ids == before


def test_a_slow_tokenizer_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        is_fast = False
        vocab_files_names: ClassVar = {"tokenizer_file": "tokenizer.json"}

    monkeypatch.setattr(checkpoint_module.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, which the runtime needs"):
        load_model(str(checkpoint("olmoe")))


def test_weights_of_another_configuration_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"Weights and config\.json don't belong together"):
        load_model(str(folder))
