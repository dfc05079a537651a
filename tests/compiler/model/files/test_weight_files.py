"""Which files are read, and that no others are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.json_files import read_json_object
from alloc_moe.compiler.model.files.weight_files import (
    WeightFiles,
    find_weight_files,
    fingerprint,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> WeightFiles:
    return find_weight_files(folder, read_json_object(folder / "config.json"))


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_a_weight(file: Path) -> None:
    tensors = load_file(file)
    next(t for t in tensors.values() if t.ndim == 2)[0, 0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})


def test_one_file_comes_before_an_index(sharded: Path) -> None:
    save_file({"weight": torch.ones(3)}, sharded / SINGLE)
    assert files_of(sharded).paths == (sharded / SINGLE,)
    assert list(files_of(sharded).tensors) == ["weight"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_what_is_no_file_leaves_the_index(sharded: Path, make: object) -> None:
    make(sharded / SINGLE)  # type: ignore[operator]
    assert len(files_of(sharded).paths) > 2


def test_the_configuration_may_name_the_file(copy: Path) -> None:
    (copy / SINGLE).rename(copy / "other.safetensors")
    edit(copy / "config.json", transformers_weights="other.safetensors")
    save_file({"weight": torch.ones(3)}, copy / SINGLE)
    assert files_of(copy).paths == (copy / "other.safetensors",)


def test_the_configuration_may_name_an_index(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "other.safetensors.index.json")
    edit(sharded / "config.json", transformers_weights="other.safetensors.index.json")
    assert len(files_of(sharded).paths) > 2


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", 3, "", "a\0b.safetensors"])
def test_a_file_outside_is_refused(copy: Path, name: object) -> None:
    edit(copy / "config.json", transformers_weights=name)
    with pytest.raises(
        CheckpointError, match=r"transformers_weights in config\.json is .* no file i"
    ):
        files_of(copy)


def test_weights_of_another_kind_are_refused(copy: Path) -> None:
    edit(copy / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\", which is no \.safetensors"):
        files_of(copy)


def test_an_index_needs_no_metadata(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert len(files_of(sharded).paths) > 2


def test_shards_may_lie_in_a_folder(sharded: Path) -> None:
    expected = files_of(sharded).tensors.keys()
    move_shards(sharded, "weights")
    assert files_of(sharded).tensors.keys() == expected
    assert {path.parent.name for path in files_of(sharded).paths} == {"weights"}


def move_shards(folder: Path, into: str) -> None:
    (folder / into).mkdir()
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in set(index.values()):
        (folder / name).rename(folder / into / name)
    edit(folder / INDEX, weight_map={key: f"{into}/{name}" for key, name in index.items()})


def test_of_a_tensor_in_two_shards_the_last_is_read(sharded: Path) -> None:
    first, *_, last = files_of(sharded).paths
    key = next(iter(load_file(first)))
    save_file(load_file(last) | {key: torch.ones(2)}, last)
    assert files_of(sharded).tensors[key].path == last


def test_a_missing_shard_is_reported(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=rf"Shard {shard.name} is named in {INDEX} but missing in"
    ):
        files_of(sharded)


def test_a_shard_without_its_tensor_is_reported(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    key, name = next(iter(index["weight_map"].items()))
    index["weight_map"][f"{key}.extra"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"{name} lacks 1 tensors .* places there, {key}\.extra among them"
    ):
        files_of(sharded)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 3}}', "[" * 100_000]
)
def test_a_damaged_index_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json (is no|is 3)"):
        find_weight_files(tmp_path, {})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"found only {name}, which may run code when read"):
        find_weight_files(tmp_path, {})


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no safetensors weights .* found none"):
        find_weight_files(tmp_path, {})


def test_a_pipe_for_a_shard_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is a pipe or a device, not a file"):
        files_of(sharded)


def test_the_fingerprint_of_an_ordinary_checkpoint_stays(copy: Path) -> None:
    # Profiles that were saved by earlier versions are told apart by it.
    file = copy / SINGLE
    size, data = file.stat().st_size, file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    expected = hashlib.sha256((copy / "config.json").read_bytes())
    expected.update(f"{SINGLE}:{size}".encode() + data[8:start])
    for offset in range(start, size, max((size - start) // 64, 1 << 16)):
        expected.update(data[offset : offset + (1 << 16)])
    assert fingerprint(files_of(copy)) == expected.hexdigest()


@pytest.mark.parametrize("into", [None, "weights"])
def test_the_fingerprint_changes_with_one_weight(sharded: Path, into: str | None) -> None:
    if into is not None:
        move_shards(sharded, into)
    before = fingerprint(files_of(sharded))
    assert fingerprint(files_of(sharded)) == before
    change_a_weight(files_of(sharded).paths[1])
    assert fingerprint(files_of(sharded)) != before


def test_the_fingerprint_changes_with_the_configuration(copy: Path) -> None:
    before = fingerprint(files_of(copy))
    edit(copy / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(files_of(copy)) != before


def test_nothing_else_in_the_folder_is_opened(copy: Path) -> None:
    before = fingerprint(files_of(copy))
    os.mkfifo(copy / "pipe.safetensors")
    (copy / "folder.safetensors").mkdir()
    (copy / "link.safetensors").symlink_to("nothing")
    (copy / "huge.safetensors").write_bytes(b"\xff" * 64)
    shutil.copy(copy / SINGLE, copy / "old.safetensors")
    assert fingerprint(files_of(copy)) == before


def test_links_are_followed_as_in_the_hubs_cache(copy: Path, tmp_path: Path) -> None:
    before = fingerprint(files_of(copy))
    (copy / SINGLE).rename(tmp_path / "blob")
    (copy / SINGLE).symlink_to(tmp_path / "blob")
    assert fingerprint(files_of(copy)) == before
