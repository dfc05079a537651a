"""The names of data files inside a saved graph, read and replaced without touching the data."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError

_EXTERNAL = onnx.TensorProto.EXTERNAL
_LOCATION = "location"


def data_names(graph: bytes) -> set[str] | None:
    """Return the data files that a serialized model names; None if it is no model at all."""
    model = _parsed(graph)
    if model is None:
        return None
    return {posixpath.normpath(entry.value) for entry in _locations(model)}


def renamed_data(graph: bytes, old: str, new: str) -> bytes:
    """Return a serialized model that finds in the file `new` what it found in `old`."""
    model = _parsed(graph)
    assert model is not None
    for entry in _locations(model):
        if posixpath.normpath(entry.value) == old:
            entry.value = new
    return bytes(model.SerializeToString())


def _parsed(graph: bytes) -> onnx.ModelProto | None:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(graph)
    except DecodeError:
        return None
    return model if model.HasField("graph") else None


def _locations(model: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    tensors = [*_of_graph(model.graph)]
    for function in model.functions:
        tensors += _of_nodes(function.node)
    for tensor in tensors:
        if tensor.data_location == _EXTERNAL:
            yield from (entry for entry in tensor.external_data if entry.key == _LOCATION)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
