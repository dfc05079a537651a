"""The initializers of an ONNX file: where each one's values are, read without the onnx package."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alloc_moe.runtime.artifact.onnx_file import graph_initializers, read_entry, tensor_fields
from alloc_moe.runtime.errors import ArtifactError

_DIMS, _TYPE, _FLOATS, _NAME, _RAW, _EXTERNAL = 1, 2, 4, 8, 9, 13
_BFLOAT16 = 16
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    _BFLOAT16: np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Initializer:
    """One tensor of the graph: its ONNX element type, its shape, and its values.

    ``values`` is an array as numpy has it, mapped from the data file where it is there; bfloat16 is
    uint16.
    """

    element_type: int
    shape: tuple[int, ...]
    values: NDArray[Any]

    def floats(self) -> NDArray[np.float32]:
        """Return the values as float32."""
        if self.element_type == _BFLOAT16:
            return from_bfloat16(self.values)
        return self.values.astype(np.float32)


def to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of the nearest numbers in bfloat16, ties to even."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the numbers that bits are in bfloat16, which numpy lacks."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_initializers(
    path: Path, data: Mapping[str, Path], names: Collection[str]
) -> dict[str, Initializer]:
    """Return initializers of a graph by name.

    Args:
        path: The graph's file.
        data: The paths of its data files by the names that the graph has for them.
        names: Of the initializers.

    Raises:
        ArtifactError: One isn't there, or has values of a type that isn't handled.
    """
    try:
        found = dict(_found(path, data, names))
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ArtifactError(
            f"The weights of {path} can't be read: {error}. Copy the artifact again, or compile "
            "the model again."
        ) from error
    if lacking := set(names) - set(found):
        raise ArtifactError(
            f"{path} has no weight {min(lacking)}, which its step program needs. "
            "Compile the model again."
        )
    return found


def _found(
    path: Path, data: Mapping[str, Path], names: Collection[str]
) -> Iterator[tuple[str, Initializer]]:
    for tensor in graph_initializers(path):
        fields = tensor_fields(tensor)
        name = bytes(fields.get(_NAME, [b""])[0]).decode()
        if name not in names:
            continue
        element_type = int(fields.get(_TYPE, [0])[0])
        if element_type not in _DTYPES:
            raise ArtifactError(f"The weight {name} of {path} is of a type that isn't handled.")
        dtype, shape = _DTYPES[element_type], tuple(map(int, fields.get(_DIMS, [])))
        size = math.prod(shape)
        entries = dict(map(read_entry, fields.get(_EXTERNAL, [])))
        if "location" in entries:
            file, offset = data[entries["location"]], int(entries.get("offset", 0))
            values: NDArray[Any] = np.memmap(file, dtype, "r", offset, (size,))
        elif _RAW in fields:
            values = np.frombuffer(fields[_RAW][0], dtype, size)
        else:
            values = np.frombuffer(fields[_FLOATS][0], np.float32, size).astype(dtype)
        yield name, Initializer(element_type, shape, values.reshape(shape))
