"""What the header of a safetensors file says, checked before anything relies on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.json_files import parse_object, regular_size, short, shown

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads."""

_METADATA = "__metadata__"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: bytes `begin` to `end` of `path`, its type as that says."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return key -> tensor of a safetensors file, without reading any tensor.

    Raises:
        CheckpointError: It is no such file, is truncated, or its header contradicts itself: sizes
            that are no numbers, tensors that overlap, leave holes or end outside the file.
    """
    size = regular_size(path)
    try:
        entries, start = _read_entries(path, size)
        tensors = {
            key: _tensor(path, key, entry, start)
            for key, entry in entries.items()
            if key != _METADATA
        }
        _check_places(tensors, start, size)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The shard {path} can't be read ({short(error)}). It may be truncated: download it "
            "again."
        ) from error
    return tensors


def header_bytes(path: Path) -> int:
    """Return where the tensors of a file begin whose header was read before."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read_entries(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
        entries = parse_object(file.read(length))
    metadata = entries.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"its {_METADATA} is {shown(metadata)}")
    return entries, 8 + length


def _tensor(path: Path, key: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
        bits = _BITS[dtype]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the entry of {shown(key)} is {shown(entry)}") from error
    if not isinstance(shape, list) or not all(map(_is_size, [*shape, begin, end])):
        raise ValueError(f"shape or place of {shown(key)} is {shown([shape, offsets])}")
    needed = math.prod(shape) * bits
    if needed % 8 or end - begin != needed // 8:
        raise ValueError(
            f"{shown(key)} of type {dtype} and shape {shown(shape)} is placed at {offsets}, which "
            "is not its size"
        )
    return StoredTensor(path, dtype, tuple(shape), start + begin, start + end)


def _is_size(value: object) -> bool:
    # 2 ** 63: what torch and numpy can count to.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_places(tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Raise ValueError unless the tensors lie one after another up to the end of the file."""
    end = start
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "leaves a hole"
            raise ValueError(f"{shown(key)} at byte {tensor.begin} {what}")
        end = tensor.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
