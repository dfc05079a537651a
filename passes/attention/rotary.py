"""Rotary embeddings: where values are rotated, and the tables of cosines and sines by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from alloc_moe.passes.attention.layers import constant, producer

_POSITIONS = "position_ids"
_LAST_AXIS = ([3], [-1])
_END = 1 << 31  # slices to there or beyond go to the end

Angles = Callable[[NDArray[np.int64]], NDArray[np.floating]]
"""``angles(positions [n])`` -> their cosines, or sines, of half the rotated size [n, half]."""


@dataclass(frozen=True)
class Rotation:
    """A rotation by position of the first ``size`` elements of each head.

    ``source`` [batch, heads, sequence, head size] is what is rotated; ``cosine`` and ``sine``
    [batch, sequence, size or half of it] are by what. ``interleaved``: elements 2i and 2i + 1 are
    rotated together, else i and i + size / 2.
    """

    source: ir.Value
    cosine: ir.Value
    sine: ir.Value
    size: int
    interleaved: bool = False


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines by position, as functions of positions, and their type."""

    cosine: Angles
    sine: Angles
    dtype: ir.DataType


def match_rotation(value: ir.Value | None) -> Rotation | None:
    """Return the rotation that makes a value [batch, heads, sequence, size], if one does.

    It is a RotaryEmbedding node, or x cos + rotate_half(x) sin as transformers writes it, of all of
    a head or of the beginning.
    """
    node = producer(value)
    if node is None:
        return None
    match node.op_type:
        case "RotaryEmbedding":
            return _of_node(node)
        case "Add":
            return _of_halves(node)
        case "Concat":
            return _of_part(node)
    return None


def _of_node(node: ir.Node) -> Rotation | None:
    source, cosine, sine = node.inputs[:3]
    if len(node.inputs) != 3 or source is None or cosine is None or sine is None:
        return None
    size = _integer(node, "rotary_embedding_dim") or _last(source)
    if not size or source.shape is None or len(source.shape) != 4:
        return None
    return Rotation(source, cosine, sine, size, bool(_integer(node, "interleaved")))


def _of_halves(node: ir.Node) -> Rotation | None:
    """Match x * cos + concat(-x[half:], x[:half]) * sin."""
    left, right = (producer(value) for value in node.inputs)
    for plain, turned in ((left, right), (right, left)):
        if plain is None or turned is None or {plain.op_type, turned.op_type} != {"Mul"}:
            continue
        for source, cosine in (plain.inputs, plain.inputs[::-1]):
            for halves, sine in (turned.inputs, turned.inputs[::-1]):
                angles = _per_head(cosine), _per_head(sine)
                if source is None or not _is_rotated_half(halves, source) or None in angles:
                    continue
                return Rotation(source, angles[0], angles[1], _last(source))  # type: ignore[arg-type]
    return None


def _of_part(node: ir.Node) -> Rotation | None:
    """Match concat(rotated(x[:size]), x[size:])."""
    if len(node.inputs) != 2 or not _joins_last(node):
        return None
    rotated, rest = match_rotation(node.inputs[0]), _slice(node.inputs[1])
    part = None if rotated is None else _slice(rotated.source)
    if rotated is None or rest is None or part is None or part[0] is not rest[0]:
        return None
    whole, size = part[0], rotated.size
    if part[1:] != (0, size) or rest[1:] != (size, _last(whole)):
        return None
    return Rotation(whole, rotated.cosine, rotated.sine, size, rotated.interleaved)


def _per_head(value: ir.Value | None) -> ir.Value | None:
    """Return [batch, sequence, size] of what is the same for every head."""
    node = producer(value)
    if node is None or node.op_type != "Unsqueeze" or constant(node.inputs[1]) != [1]:
        return None
    return node.inputs[0]


def _is_rotated_half(value: ir.Value | None, source: ir.Value) -> bool:
    node = producer(value)
    size = _last(source)
    if node is None or node.op_type != "Concat" or not size or not _joins_last(node):
        return False
    negated = producer(node.inputs[0])
    if negated is None or negated.op_type != "Neg":
        return False
    second, first = _slice(negated.inputs[0]), _slice(node.inputs[1])
    return second == (source, size // 2, size) and first == (source, 0, size // 2)


def _slice(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """Return what of the last of four axes a Slice takes: source, begin and end."""
    node = producer(value)
    if node is None or node.op_type != "Slice" or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    start, end, axes, steps = ([constant(given) for given in node.inputs[1:]] + [[1]])[:4]
    size = _last(source)
    if start is None or end is None or axes not in _LAST_AXIS or steps != [1] or not size:
        return None
    return source, start[0], size if end[0] >= _END else min(end[0], size)


def _joins_last(node: ir.Node) -> bool:
    return node.op_type == "Concat" and node.attributes["axis"].as_int() in (-1, 3)


def _last(value: ir.Value | None) -> int:
    shape = None if value is None else value.shape
    size = shape[-1] if shape is not None and len(shape) else 0
    return size if isinstance(size, int) else 0


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def rotary_tables(model: ir.Model, rotation: Rotation, positions: int) -> RotaryTables | None:
    """Return by what positions are rotated, if that depends on nothing but each position.

    Embeddings that stretch with the length of the text depend on all positions of a call.

    Args:
        model: Whose graph computes the cosines and sines.
        rotation: One of its rotations.
        positions: How many there are.
    """
    found = [_angles(model, value, rotation.size) for value in (rotation.cosine, rotation.sine)]
    cosine, sine = found
    if cosine is None or sine is None or not (_is_local(cosine, positions, rotation.size)):
        return None
    dtype = rotation.source.dtype
    if dtype is None or not _is_local(sine, positions, rotation.size):
        return None
    half = rotation.size // 2

    def first_half(angles: Callable[[NDArray[np.int64]], NDArray[np.floating]]) -> Angles:
        return lambda wanted: angles(wanted)[:, :half].astype(dtype.numpy())

    return RotaryTables(first_half(cosine), first_half(sine), dtype)


def _angles(model: ir.Model, value: ir.Value, size: int) -> Angles | None:
    """Return a function from positions [n] to a value [1, n, width], float32, if they decide it."""
    given = next((put for put in model.graph.inputs if put.name == _POSITIONS), None)
    if given is None or not _depends_only_on(value, given):
        return None
    graph = ir.convenience.extract(model.graph, [given], [value])
    floats = ir.Value(name="angles", type=ir.TensorType(ir.DataType.FLOAT))
    graph.append(ir.node("Cast", graph.outputs, attributes={"to": 1}, outputs=[floats]))
    graph.outputs[:] = [floats]
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    content = ir.to_proto(part).SerializeToString()

    def compute(positions: NDArray[np.int64]) -> NDArray[np.floating]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(content, options, providers=providers)
        (angles,) = session.run(None, {_POSITIONS: positions[None]})
        return np.asarray(angles[0])

    return compute


def _depends_only_on(value: ir.Value, given: ir.Value) -> bool:
    seen: set[ir.Value] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if current in seen or current is given or current.is_initializer():
            continue
        seen.add(current)
        node = current.producer()
        if node is None:  # another input
            return False
        todo += [used for used in node.inputs if used is not None]
    return given in {used for node in map(producer, seen) if node for used in node.inputs}


def _is_local(angles: Angles, positions: int, size: int) -> bool:
    """Whether a position's angles don't depend on a call's others, and say one thing twice."""
    everywhere = angles(np.arange(positions))
    width = everywhere.shape[-1]
    if everywhere.shape != (positions, width) or width not in (size, size // 2):
        return False
    if width == size and not np.array_equal(everywhere[:, : size // 2], everywhere[:, size // 2 :]):
        return False
    few = [np.arange(min(4, positions)), np.array([positions - 1]), np.array([positions // 2])]
    return all(np.array_equal(angles(some), everywhere[some]) for some in few)
