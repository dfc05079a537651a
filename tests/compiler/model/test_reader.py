from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.stored import open_weights
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.reader import CheckpointReader

Models = Callable[[str], MoeModel]


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


def test_every_weight_equals_that_of_the_loaded_model(moe_model: Models, any_family: str) -> None:
    moe = moe_model(any_family)
    assert_reads_all(moe.checkpoint.reader, moe.model)


def test_bfloat16_weights_are_read_exactly(moe_model: Models, tmp_path: Path) -> None:
    moe = moe_model("mixtral")
    halved = {name: tensor.bfloat16() for name, tensor in moe.model.state_dict().items()}
    moe.model.save_pretrained(tmp_path, state_dict=halved)
    reader = CheckpointReader(open_weights(tmp_path), moe.checkpoint.skeleton)
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
    assert_reads_all(CheckpointReader(open_weights(sharded), moe.checkpoint.skeleton), moe.model)


def test_a_missing_tensor_is_reported(moe_model: Models, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(
        CheckpointError,
        match=r"lacks 1 weights that OlmoeForCausalLM needs, model\.layers\.1\.self_attn\.q_proj",
    ):
        CheckpointReader(open_weights(copy), moe_model("olmoe").checkpoint.skeleton)


def test_missing_experts_are_reported(moe_model: Models, copy: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.mlp.experts.7.")]:
            del tensors[name]

    edit(copy, drop)
    with pytest.raises(
        CheckpointError, match=r"the shape \(7, 64, 32\), config\.json asks for \(8, 64, 32\)"
    ):
        CheckpointReader(open_weights(copy), moe_model("olmoe").checkpoint.skeleton)


def test_a_weight_of_another_shape_is_reported(moe_model: Models, copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(288, 32)}))
    with pytest.raises(
        CheckpointError,
        match=r"lm_head\.weight gives lm_head\.weight the shape \(288, 32\), "
        r"config\.json asks for \(288, 64\)",
    ):
        CheckpointReader(open_weights(copy), moe_model("olmoe").checkpoint.skeleton)


def test_a_file_that_is_cut_later_is_reported(moe_model: Models, copy: Path) -> None:
    reader = CheckpointReader(open_weights(copy), moe_model("olmoe").checkpoint.skeleton)
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="be truncated"):
        reader.read("lm_head.weight", torch.float32)
