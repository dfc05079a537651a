"""What the runtime must know of an ONNX file, read and extended without the onnx package.

An ONNX file is one protobuf message. Walking its fields and skipping all bodies takes milliseconds
and no memory, whatever the size of the model. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import itertools
import mmap
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloc_moe.runtime.errors import ArtifactError

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_NODE_OUTPUT = 2
_TENSOR_DIMS, _TENSOR_EXTERNAL_DATA = 1, 13
_KEY, _VALUE = 1, 2  # of metadata and external data entries
_VALUE_NAME = 1

_MOST_BYTES = 2**31 - 1  # protobuf's own limit
_MOST_FIELDS = 1_500_000  # a real graph has some ten thousand
_SHIFTS = range(0, 70, 7)  # a number has 64 bits, so ten bytes at most
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
        data = _mapped(path)
        return _read_model(memoryview(data))  # unmapped when the last view of it is gone
    except FileNotFoundError as error:
        raise ArtifactError(
            f"There is no file {path}. Check the path; alloc-compile writes such files."
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, IndexError) as error:  # an empty file is a ValueError of mmap
        raise ArtifactError(
            f"{path} is no ONNX file, or a damaged one. Copy it again, or compile the model again."
        ) from error


def _mapped(path: Path) -> mmap.mmap:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe might never end
        raise ArtifactError(f"{path} can't be read: it is a folder, pipe or device, and no file.")
    if status.st_size > _MOST_BYTES:
        raise ValueError("larger than any ONNX file can be")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """Return the serialized model with more of its values as graph outputs.

    Protobuf merges concatenated messages: repeated fields are appended, embedded messages merged.
    So a model whose graph has nothing but outputs, written after the model, adds them to it. Their
    types are left out; onnxruntime infers them.
    """
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return model + _field(_MODEL_GRAPH, b"".join(outputs))


def with_data_names(model: bytes, names: Mapping[str, str]) -> bytes:
    """Return the serialized model with other names for its external data files.

    Args:
        model: The model.
        names: The new name by the one that the graph has.
    """

    def tensor(body: memoryview) -> bytes:
        return _rewritten(body, {_TENSOR_EXTERNAL_DATA: entry})

    def entry(body: memoryview) -> bytes:
        key, value = read_entry(body)
        if key != "location" or value not in names:
            return bytes(body)
        return _field(_KEY, b"location") + _field(_VALUE, names[value].encode())

    def graph(body: memoryview) -> bytes:
        return _rewritten(body, {_GRAPH_INITIALIZER: tensor})

    return _rewritten(memoryview(model), {_MODEL_GRAPH: graph})


def graph_initializers(path: Path) -> Iterator[memoryview]:
    """Yield the serialized initializers of an ONNX file's graph, see `tensor_fields`."""
    model = memoryview(_mapped(path))
    for number, body in _fields(model, _allowance()):
        if number == _MODEL_GRAPH:
            for part, content in _fields(body, _allowance()):
                if part == _GRAPH_INITIALIZER:
                    yield content


def tensor_fields(message: memoryview) -> dict[int, list[Any]]:
    """Return the fields of a message by number: bodies, and numbers, packed ones taken apart."""
    fields: dict[int, list[Any]] = {}
    for number, begin, start, end in _walk(message, _allowance()):
        if start >= 0 and number == _TENSOR_DIMS:
            while start < end:
                value, start = _varint(message, start)
                fields.setdefault(number, []).append(value)
        elif start >= 0:
            fields.setdefault(number, []).append(message[start:end])
        elif message[begin] & 7 == _VARINT:
            fields.setdefault(number, []).append(_varint(message, begin + 1)[0])
    return fields


def _rewritten(message: memoryview, rewrites: Mapping[int, Callable[[memoryview], bytes]]) -> bytes:
    """Return a message with some of its length-delimited fields made anew."""
    parts: list[bytes | memoryview] = []
    copied = 0
    for number, begin, start, end in _walk(message, _allowance()):
        if start >= 0 and number in rewrites:
            parts.append(message[copied:begin])
            parts.append(_field(number, rewrites[number](message[start:end])))
            copied = end
    return b"".join([*parts, message[copied:]])


def _read_model(model: memoryview) -> OnnxFile:
    metadata: dict[str, str] = {}
    data_files: dict[str, int] = {}
    node_outputs: set[str] = set()
    has_graph = False
    allowance = _allowance()
    for number, body in _fields(model, allowance):
        if number == _MODEL_METADATA:
            entry = read_entry(body)
            metadata[entry[0]] = entry[1]
        elif number == _MODEL_GRAPH:
            has_graph = True
            for part, content in _fields(body, allowance):
                if part == _GRAPH_NODE:
                    for field, name in _fields(content, allowance):
                        if field == _NODE_OUTPUT:
                            node_outputs.add(str(name, "utf-8"))
                elif part == _GRAPH_INITIALIZER:
                    _add_data_file(content, data_files, allowance)
    if not has_graph:
        raise ValueError("no graph")
    return OnnxFile(metadata, data_files, frozenset(node_outputs))


def _add_data_file(
    tensor: memoryview, data_files: dict[str, int], allowance: Iterator[None]
) -> None:
    """Note the file that holds a tensor, if any, and that the tensor's last byte must be in it."""
    entries = dict(
        read_entry(body)
        for field, body in _fields(tensor, allowance)
        if field == _TENSOR_EXTERNAL_DATA
    )
    if location := entries.get("location"):
        offset, length = (int(entries.get(key, 0)) for key in ("offset", "length"))
        if min(offset, length) < 0:
            raise ValueError("a tensor begins before its file")
        data_files[location] = max(data_files.get(location, 0), offset + length)


def read_entry(body: memoryview) -> tuple[str, str]:
    """Return key and value of an entry of metadata or external data."""
    fields = {number: str(text, "utf-8") for number, text in _fields(body, _allowance())}
    return fields.get(_KEY, ""), fields.get(_VALUE, "")


def _allowance() -> Iterator[None]:
    """Return an iterator that ends after as many fields as no real graph has."""
    return itertools.repeat(None, _MOST_FIELDS)


def _fields(message: memoryview, allowance: Iterator[None]) -> Iterator[tuple[int, memoryview]]:
    """Yield number and body of a message's length-delimited fields; numbers are skipped."""
    for number, _, start, end in _walk(message, allowance):
        if start >= 0:
            yield number, message[start:end]


def _walk(message: memoryview, allowance: Iterator[None]) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each field its number, where it begins, where its body begins, where it ends.

    Without a length there is no body: it begins at -1.
    """
    position, size = 0, len(message)
    for _ in allowance:
        if position >= size:
            break
        begin, start = position, -1
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            length, start = _varint(message, position)
            position = start + length
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        else:
            raise ValueError(f"no protobuf: wire type {kind}")
        if position > size:
            raise ValueError("a field ends after its message")
        yield tag >> 3, begin, start, position
    else:
        raise ValueError("more fields than any graph has")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in _SHIFTS:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("no protobuf: a number of more than ten bytes")


def _field(number: int, body: bytes) -> bytes:
    return _to_varint(number << 3 | _BYTES) + _to_varint(len(body)) + body


def _to_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
