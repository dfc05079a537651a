"""Headers that contradict themselves are refused, whatever the contradiction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.headers import read_header

FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = b"\0" * 8, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_header_says_where_tensors_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(0, 4), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    header = read_header(tmp_path / "x")
    assert {name: tensor.shape for name, tensor in header.items()} == {
        "a": (2, 3),
        "b": (0, 4),
        "c": (),
    }
    place = header["a"]
    stored = (tmp_path / "x").read_bytes()[place.begin : place.end]
    assert stored == tensors["a"].numpy().tobytes()
    assert place.dtype == "F32"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "Expecting value"),
        (b"\xff\xfe", "codec"),
        (b"[]", "it holds a list"),
        (b"[" * 5000, "nested too deep"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested deeper than 60"),
        (b'{"a": 1, "a": 2}', 'the key "a" twice'),
        ({"a": 3}, 'the entry of "a" is 3'),
        ({"a": {**FLOATS, "dtype": "F7"}}, "F7"),
        ({"a": {**FLOATS, "dtype": ["F32"]}}, "the entry of"),
        ({"a": {**FLOATS, "shape": [-2]}}, "shape or place"),
        ({"a": {**FLOATS, "shape": [2.0]}}, "shape or place"),
        ({"a": {**FLOATS, "shape": "2"}}, "shape or place"),
        ({"a": {**FLOATS, "shape": [True, 2]}}, "shape or place"),
        ({"a": {**FLOATS, "shape": [1 << 70]}}, "shape or place"),
        ({"a": {**FLOATS, "shape": [3]}}, "is not its size"),
        ({"a": {**FLOATS, "data_offsets": [8, 0]}}, "is not its size"),
        ({"a": {**FLOATS, "data_offsets": [-8, 0]}}, "shape or place"),
        ({"a": {**FLOATS, "data_offsets": [0, 4, 8]}}, "the entry of"),
        ({"a": {**FLOATS, "data_offsets": [8, 16]}}, "leaves a hole"),
        ({"a": FLOATS, "b": FLOATS}, "overlaps the tensor before it"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, "is not its size"),
        ({"a": {**FLOATS, "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at byte"),
        ({}, "its tensors end at byte"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, header: Any, reason: str
) -> None:
    write(tmp_path / "x", header)
    with pytest.raises(CheckpointError, match=rf"The shard .*x can't be read \(.*{reason}"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("length", [3, 1000, 1 << 62, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    write(tmp_path / "x", b"{}", b"", length=length)
    with pytest.raises(CheckpointError, match=rf"its header would have {length} bytes"):
        read_header(tmp_path / "x")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole: takes no disk
    with pytest.raises(CheckpointError, match="its header has 200000000 bytes, at most 100000000"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_file_is_reported(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read .* be truncated"):
        read_header(file)


def test_a_file_with_bytes_behind_its_tensors_is_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="its tensors end at byte"):
        read_header(file)
