from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.checkpoint import CheckpointReader, find_shards, fingerprint
from alloc_moe.compiler.model.moe_model import MoeModel

Models = Callable[[str], MoeModel]

FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))


@pytest.fixture
def sharded(moe_model: Models, tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path / "sharded"
    moe_model("olmoe").model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_reads_all(reader: CheckpointReader, expected: torch.nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        read = reader.read(name, torch.float32)
        assert read.is_contiguous()
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_equals_that_of_the_loaded_model(moe_model: Models, family: str) -> None:
    moe = moe_model(family)
    assert_reads_all(moe.checkpoint.reader, moe.model)


def test_bfloat16_weights_are_read_exactly(moe_model: Models, tmp_path: Path) -> None:
    moe = moe_model("mixtral")
    halved = {name: tensor.bfloat16() for name, tensor in moe.model.state_dict().items()}
    moe.model.save_pretrained(tmp_path, state_dict=halved)
    reader = CheckpointReader(tmp_path, moe.checkpoint.skeleton)
    for name, tensor in halved.items():
        assert torch.equal(reader.read(name, torch.float32), tensor.float()), name
        assert torch.equal(reader.read(name, torch.bfloat16), tensor), name


def test_both_names_of_a_tied_weight_can_be_read(moe_model: Models) -> None:
    reader = moe_model("qwen2_moe").checkpoint.reader
    names = ("lm_head.weight", "model.embed_tokens.weight")
    first, second = (reader.read(name, torch.float32) for name in names)
    assert torch.equal(first, second)
    assert all(name in reader for name in names)
    assert "model.layers.0.mlp.nothing" not in reader


def test_what_is_read_is_a_copy(moe_model: Models) -> None:
    reader = moe_model("olmoe").checkpoint.reader
    reader.read("lm_head.weight", torch.float32).zero_()
    assert reader.read("lm_head.weight", torch.float32).any()


def test_shards_are_read_like_one_file(moe_model: Models, sharded: Path) -> None:
    moe = moe_model("olmoe")
    assert_reads_all(CheckpointReader(sharded, moe.checkpoint.skeleton), moe.model)


def test_a_missing_shard_is_reported(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=rf"Shard {shard.name} is named in {INDEX} but missing in"
    ):
        find_shards(sharded)


def test_a_shard_without_its_tensor_is_reported(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    key, name = next(iter(index["weight_map"].items()))
    index["weight_map"][f"{key}.extra"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"{name} lacks 1 tensors .* places there, {key}\.extra among them"
    ):
        find_shards(sharded)


@pytest.mark.parametrize("size", [4, 1000, -1])
def test_a_truncated_file_is_reported(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read .* be truncated"):
        find_shards(copy)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is no safetensors index"):
        find_shards(tmp_path)


def test_a_missing_tensor_is_reported(moe_model: Models, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(
        CheckpointError,
        match=r"lacks 1 weights that OlmoeForCausalLM needs, model\.layers\.1\.self_attn\.q_proj",
    ):
        CheckpointReader(copy, moe_model("olmoe").checkpoint.skeleton)


def test_missing_experts_are_reported(moe_model: Models, copy: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.mlp.experts.7.")]:
            del tensors[name]

    edit(copy, drop)
    with pytest.raises(
        CheckpointError, match=r"the shape \(7, 64, 32\), config\.json asks for \(8, 64, 32\)"
    ):
        CheckpointReader(copy, moe_model("olmoe").checkpoint.skeleton)


def test_a_weight_of_another_shape_is_reported(moe_model: Models, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(288, 32)}))
    with pytest.raises(
        CheckpointError,
        match=r"lm_head\.weight gives lm_head\.weight the shape \(288, 32\), "
        r"config\.json asks for \(288, 64\)",
    ):
        CheckpointReader(copy, moe_model("olmoe").checkpoint.skeleton)


def test_a_file_that_is_cut_later_is_reported(moe_model: Models, copy: Path) -> None:
    reader = CheckpointReader(copy, moe_model("olmoe").checkpoint.skeleton)
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="be truncated"):
        reader.read("lm_head.weight", torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"found only {name}, which may run code when read"):
        find_shards(tmp_path)


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no safetensors weights .* found none"):
        find_shards(tmp_path)


def test_the_fingerprint_changes_with_one_weight(copy: Path) -> None:
    before = fingerprint(copy)
    assert fingerprint(copy) == before

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"][3, 5] += 1e-6

    edit(copy, change)
    assert fingerprint(copy) != before


def test_the_fingerprint_changes_with_the_configuration(copy: Path) -> None:
    before = fingerprint(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(copy) != before
