"""What the runtime must know of an ONNX file, read and extended without the onnx package.

An ONNX file is one protobuf message. Walking its fields and skipping all bodies takes milliseconds
and no memory, whatever the size of the model. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alloc_moe.runtime.errors import ArtifactError

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_NODE_OUTPUT = 2
_TENSOR_EXTERNAL_DATA = 13
_KEY, _VALUE = 1, 2  # of metadata and external data entries
_VALUE_NAME = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxFile:
    """The parts of an ONNX file that are looked at before a session is made.

    ``data_files`` maps each external data file, as named in the graph, to the bytes it must have.
    ``node_outputs`` are the names of all values computed in the main graph.
    """

    metadata: dict[str, str]
    data_files: dict[str, int]
    node_outputs: frozenset[str]


def read_onnx_file(path: Path) -> OnnxFile:
    """Return metadata, external data files and value names of an ONNX file.

    Raises:
        ArtifactError: There is no such file, or it is no ONNX file, or it was cut off.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read_model(memoryview(data))  # unmapped when the last view of it is gone
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no file {path}.") from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, IndexError) as error:  # an empty file is a ValueError of mmap
        raise ArtifactError(
            f"{path} is no ONNX file, or a damaged one. Copy it again, or compile the model again."
        ) from error


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """Return the serialized model with more of its values as graph outputs.

    Protobuf merges concatenated messages: repeated fields are appended, embedded messages merged.
    So a model whose graph has nothing but outputs, written after the model, adds them to it. Their
    types are left out; onnxruntime infers them.
    """
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return model + _field(_MODEL_GRAPH, b"".join(outputs))


def _read_model(model: memoryview) -> OnnxFile:
    metadata: dict[str, str] = {}
    data_files: dict[str, int] = {}
    node_outputs: set[str] = set()
    has_graph = False
    for number, body in _fields(model):
        if number == _MODEL_METADATA:
            entry = _entry(body)
            metadata[entry[0]] = entry[1]
        elif number == _MODEL_GRAPH:
            has_graph = True
            for part, content in _fields(body):
                if part == _GRAPH_NODE:
                    names = (name for field, name in _fields(content) if field == _NODE_OUTPUT)
                    node_outputs.update(str(name, "utf-8") for name in names)
                elif part == _GRAPH_INITIALIZER:
                    _add_data_file(content, data_files)
    if not has_graph:
        raise ValueError("no graph")
    return OnnxFile(metadata, data_files, frozenset(node_outputs))


def _add_data_file(tensor: memoryview, data_files: dict[str, int]) -> None:
    """Note the file that holds a tensor, if any, and that the tensor's last byte must be in it."""
    entries = dict(
        _entry(body) for field, body in _fields(tensor) if field == _TENSOR_EXTERNAL_DATA
    )
    if location := entries.get("location"):
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        data_files[location] = max(data_files.get(location, 0), end)


def _entry(body: memoryview) -> tuple[str, str]:
    fields = {number: str(text, "utf-8") for number, text in _fields(body)}
    return fields.get(_KEY, ""), fields.get(_VALUE, "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and body of a message's length-delimited fields; numbers are skipped."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _BYTES:
            length, position = _varint(message, position)
            if position + length > end:
                raise ValueError("a field ends after its message")
            yield tag >> 3, message[position : position + length]
            position += length
        else:
            raise ValueError(f"no protobuf: wire type {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _field(number: int, body: bytes) -> bytes:
    return _to_varint(number << 3 | _BYTES) + _to_varint(len(body)) + body


def _to_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
