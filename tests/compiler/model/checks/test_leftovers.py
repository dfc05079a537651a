"""What a checkpoint holds besides the model is refused or said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.runtime.console import Console

IDS = torch.arange(3, 40)[None]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add(folder: Path, *names: str) -> None:
    change(folder, lambda tensors: tensors.update({n: torch.zeros(2, 2) for n in names}))


def configure(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.fixture(params=["olmoe", "qwen2_moe"])
def either(
    checkpoint: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Path:
    return Path(shutil.copytree(checkpoint(request.param), tmp_path / "copy"))


def test_layers_that_the_configuration_leaves_out_are_refused(copy: Path) -> None:
    configure(copy, num_hidden_layers=2)
    with pytest.raises(
        CheckpointError,
        match=r"decoder layer 2, model\.layers\.2\..* says that there are 2 layers \(0 to 1\)",
    ):
        load_model(str(copy))


def test_layers_that_predict_further_tokens_are_said(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(copy, "model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight")
    assert load_model(str(copy), Console()).checkpoint.notes == (
        "Layer 3 of the checkpoint predicts further tokens (multi-token prediction), which "
        "generation doesn't need: 2 of its tensors are left out",
    )
    assert "Layer 3 of the checkpoint predicts further tokens" in capsys.readouterr().err


def test_a_second_set_of_weights_is_said(copy: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    [note] = load_model(str(copy)).checkpoint.notes
    assert note.startswith("There are two sets of weights: model.safetensors is read, the shards")


def test_layers_of_another_part_are_said(copy: Path) -> None:
    add(copy, "vision_tower.layers.9.weight")
    [note] = load_model(str(copy)).checkpoint.notes
    assert note.startswith("1 of the checkpoint's tensors belong to no weight")


def test_tensors_of_no_weight_are_said(copy: Path) -> None:
    add(copy, "a.inv_freq", "b", "model.c", "model.d")
    assert load_model(str(copy)).checkpoint.notes == (
        "4 of the checkpoint's tensors belong to no weight and are left out: a.inv_freq, b, "
        "model.c, ...",
    )


def test_an_adapter_beside_is_said(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    [note] = load_model(str(copy)).checkpoint.notes
    assert "The adapter beside the weights (adapter_config.json) is left out" in note


def test_an_adapter_alone_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .* merge_and_unload\(\)"):
        load_model(str(copy))


def test_nothing_is_said_of_an_ordinary_checkpoint(
    moe_model: Callable[[str], MoeModel], either: Path
) -> None:
    assert load_model(str(either), offload="always").checkpoint.notes == ()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_names_within_a_wrapper_are_told(copy: Path, prefix: str) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change(copy, wrap)
    with pytest.raises(CheckpointError, match=rf"All its tensors begin with {prefix}, as \w+"):
        load_model(str(copy))


@pytest.mark.parametrize("mode", ["never", "always"])
def test_names_of_a_base_model_are_read(
    checkpoint: Callable[[str], Path], tmp_path: Path, mode: str
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2_moe"), tmp_path / "copy"))  # a tied head

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    with torch.no_grad():
        expected = load_model(str(folder)).model(input_ids=IDS).logits
        change(folder, strip)
        moe = load_model(str(folder), offload=mode)  # type: ignore[arg-type]
        assert torch.equal(moe.model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("mode", ["never", "always"])
def test_a_head_of_its_own_is_not_replaced_by_the_embedding(copy: Path, mode: str) -> None:
    with torch.no_grad():
        expected = load_model(str(copy)).model(input_ids=IDS).logits
        configure(copy, tie_word_embeddings=True)
        moe = load_model(str(copy), offload=mode)  # type: ignore[arg-type]
        assert torch.equal(moe.model(input_ids=IDS).logits, expected)
    head, embedding = (
        moe.checkpoint.reader.read(name, torch.float32)
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert not torch.equal(head, embedding)
    assert moe.config.tie_word_embeddings is False
    skeleton = moe.checkpoint.skeleton
    assert skeleton.get_output_embeddings().weight is not skeleton.get_input_embeddings().weight


def test_a_head_that_equals_the_embedding_stays_tied(copy: Path) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(copy, tie)
    configure(copy, tie_word_embeddings=True)
    assert load_model(str(copy)).config.tie_word_embeddings is True


@pytest.mark.parametrize("mode", ["never", "always"])
def test_one_file_is_loaded_whatever_index_lies_beside(sharded: Path, mode: str) -> None:
    before = load_model(str(sharded), offload=mode)  # type: ignore[arg-type]
    tensors = {name: 2 * tensor for name, tensor in before.model.state_dict().items()}
    if mode == "always":
        reader = before.checkpoint.reader
        tensors = {name: 2 * reader.read(name, torch.float32) for name in tensors}
    save_file(tensors, sharded / "model.safetensors", metadata={"format": "pt"})
    moe = load_model(str(sharded), offload=mode)  # type: ignore[arg-type]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(moe.checkpoint.reader.read(name, torch.float32), tensors[name])
    if mode == "never":
        assert torch.equal(moe.model.get_parameter(name), tensors[name])
    assert moe.fingerprint != before.fingerprint
