"""Weights of a model in files, under the names that they have on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alloc_moe.compiler.checkpoints import shards, tensors
from alloc_moe.compiler.checkpoints.shards import index_of, write_shards
from alloc_moe.compiler.checkpoints.tensors import write_tensors
from alloc_moe.compiler.errors import OutputError
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Correction
from alloc_moe.runtime.console import Console

QUIET = Console(quiet=True)
OF_ANOTHER_CLASS = ("qwen3_vl_moe",)  # its text part is written as a Qwen3-MoE, by its names


@pytest.fixture
def opened(checkpoint: Callable[[str], Path]) -> Callable[[str], MoeModel]:
    """Return a function from a family's name to its model, whose weights aren't read."""

    def open_(family: str) -> MoeModel:
        found = open_checkpoint(str(checkpoint(family)))
        return MoeModel(found, found.skeleton)

    return open_


def test_weights_keep_their_names_and_bits(
    any_family: str,
    opened: Callable[[str], MoeModel],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    moe = opened(any_family)
    [name] = write_shards(tmp_path, moe, [None] * len(moe.layers), torch.float32, QUIET)
    found, given = load_file(tmp_path / name), load_file(checkpoint(any_family) / name)
    if any_family in OF_ANOTHER_CLASS:
        for tokenizer in checkpoint(any_family).glob("tokenizer*"):
            shutil.copy(tokenizer, tmp_path)
        moe.config.save_pretrained(tmp_path)
        again = open_checkpoint(str(tmp_path))
        names = dict(moe.model.named_parameters())
        found, given = (
            {key: each.reader.read(key, torch.float32) for key in names}
            for each in (again, moe.checkpoint)
        )
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_corrections_are_folded_into_the_last_projection(
    family: str,
    opened: Callable[[str], MoeModel],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    moe = opened(family)
    scale = np.linspace(0.5, 2, moe.config.hidden_size, dtype=np.float32)
    corrections = [Correction(scale, None), *[None] * (len(moe.layers) - 1)]
    [name] = write_shards(tmp_path, moe, corrections, torch.float32, QUIET)
    found, given = load_file(tmp_path / name), load_file(checkpoint(family) / name)
    changed = {key for key in given if not torch.equal(found[key], given[key])}
    layer = moe.layers[0]
    assert changed
    assert all(f".{layer.decoder_layer}." in key and ".experts." in key for key in changed)
    for key in changed:
        is_transposed = moe.model.get_submodule(layer.experts_name).is_transposed
        factors = torch.from_numpy(scale)
        rows = factors if is_transposed or key.endswith("bias") else factors[:, None]
        torch.testing.assert_close(found[key], given[key] * rows, rtol=1e-6, atol=0)


def test_routers_keep_biases_that_are_no_parameters_in_float32(
    opened: Callable[[str], MoeModel], tmp_path: Path
) -> None:
    moe = opened("deepseek_v3")
    [name] = write_shards(tmp_path, moe, [None] * len(moe.layers), torch.bfloat16, QUIET)
    types = {key: value.dtype for key, value in load_file(tmp_path / name).items()}
    wide = {key for key, dtype in types.items() if dtype != torch.bfloat16}
    assert wide == {f"{layer.name}.gate.e_score_correction_bias" for layer in moe.layers}


def test_shards_end_with_layers_and_have_an_index(
    opened: Callable[[str], MoeModel],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    moe = opened("olmoe")
    names = write_shards(tmp_path, moe, [None] * len(moe.layers), torch.float32, QUIET)
    parts = 3 + moe.config.num_hidden_layers  # embeddings, norm, head
    assert names == [f"model-{i:05}-of-{parts:05}.safetensors" for i in range(1, parts + 1)]
    index = json.loads(index_of(tmp_path, names))
    given = load_file(checkpoint("olmoe") / "model.safetensors")
    assert index["weight_map"].keys() == given.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in given.values())
    layer = {name for key, name in index["weight_map"].items() if key.startswith("model.layers.1.")}
    assert len(layer) == 1


def test_what_is_written_is_not_written_again(
    opened: Callable[[str], MoeModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    moe = opened("olmoe")
    given = (tmp_path, moe, [None] * len(moe.layers))
    names = write_shards(*given, torch.float32, QUIET)
    written = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / f"{names[1]}.journal").unlink()
    made: list[str] = []

    def noted(values: dict[str, torch.Tensor], path: Path) -> None:
        made.append(path.name)
        write_tensors(values, path)

    monkeypatch.setattr(shards, "write_tensors", noted)
    write_shards(*given, torch.float32, QUIET)
    assert made == [names[1]]
    assert {name: (tmp_path / name).read_bytes() for name in names} == written
    write_shards(*given, torch.bfloat16, QUIET)
    assert made[1:] == names


def test_a_full_disk_is_told(
    opened: Callable[[str], MoeModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "create", full)
    moe = opened("olmoe")
    said = r"No space left on device\. Free some space; the same command then goes on"
    with pytest.raises(OutputError, match=said):
        write_shards(tmp_path, moe, [None] * len(moe.layers), torch.float32, QUIET)


def test_files_of_tensors_are_what_the_library_reads(tmp_path: Path) -> None:
    given = {
        "narrow": torch.arange(3, dtype=torch.bfloat16),
        "wide": torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / "some.safetensors"
    write_tensors(given, path)
    found = load_file(path)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
