"""A graph cut into consecutive segments, none of which needs more weights than fit in memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    _Uses = dict[ir.Node, list[ir.Value]]
    _Weights = dict[ir.Value, frozenset[ir.Value]]


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph, by the values at their borders.

    ``inputs`` are the graph's and what earlier segments make, ``outputs`` the graph's and what
    later segments use.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def cut_graph(graph: ir.Graph, limit: int, *, state: Mapping[str, str]) -> list[Segment]:
    """Return a graph's segments in the order to run them.

    A segment ends where it would need more than `limit` bytes of external weights; of a node that
    needs more alone, it has the one. What depends on weights only crosses no cut but is computed
    in every segment that uses it, so that it stays a constant there.

    Args:
        graph: The graph, its nodes in an order in which they can run.
        limit: Bytes.
        state: Inputs and the outputs that replace them in the next call, by name. What reads one
            and what makes the other are in one segment; only the shape may be asked for before.
    """
    uses = _uses(graph)
    weights = _weights_behind(uses)
    groups = _group(uses, weights, limit, _inseparable(graph, uses, state))
    made = {
        output: index
        for index, group in enumerate(groups)
        for output in itertools.chain.from_iterable(node.outputs for node in group)
    }
    used = [
        dict.fromkeys(value for node in group for value in uses[node] if value not in weights)
        for group in groups
    ]
    last_use = {value: index for index, values in enumerate(used) for value in values}
    segments = []
    for index in range(len(groups)):
        inputs = tuple(value for value in used[index] if made.get(value) != index)
        outputs = tuple(
            value
            for value, maker in made.items()
            if maker == index and (value.is_graph_output() or last_use.get(value, 0) > index)
        )
        segments.append(Segment(inputs, outputs))
    return segments


def extract_segment(
    model: ir.Model, segment: Segment, given: Mapping[str, NDArray[np.generic]]
) -> ir.Model:
    """Return a segment as a model of its own, which refers to the same external data.

    Args:
        model: Whose graph was cut.
        segment: One of its segments.
        given: Examples, by name, of what earlier segments give it: types and ranks that the graph
            doesn't say are taken from them.
    """
    graph = ir.convenience.extract(model.graph, segment.inputs, segment.outputs)
    for value in graph.inputs:
        example = given.get(value.name or "")
        if example is not None:
            value.dtype = ir.DataType.from_numpy(example.dtype)
            value.shape = value.shape or ir.Shape([None] * example.ndim)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _uses(graph: ir.Graph) -> _Uses:
    """Return by node what it reads, its subgraphs included."""
    captured = analyze_implicit_usage(graph)
    uses = {}
    for node in graph:
        subgraphs = [
            subgraph for attribute in node.attributes.values() for subgraph in _subgraphs(attribute)
        ]
        outer = (value for subgraph in subgraphs for value in captured[subgraph])
        uses[node] = [value for value in node.inputs if value is not None]
        uses[node] += sorted(outer, key=lambda value: value.name or "")
    return uses


def _subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []


def _weights_behind(uses: _Uses) -> _Weights:
    """Return, for each value that depends on initializers only, the external ones of them."""
    behind: _Weights = {}
    for node, values in uses.items():
        for value in values:
            # One that is an input as well can be another in each call.
            if value.is_initializer() and not value.is_graph_input():
                external = isinstance(value.const_value, ir.ExternalTensor)
                behind[value] = frozenset([value] if external else [])
        if all(value in behind for value in values):
            behind |= dict.fromkeys(node.outputs, _union(behind, values))
    return behind


def _union(behind: _Weights, values: Iterable[ir.Value]) -> frozenset[ir.Value]:
    return frozenset[ir.Value]().union(*(behind.get(value, ()) for value in values))


def _inseparable(graph: ir.Graph, uses: _Uses, state: Mapping[str, str]) -> Collection[int]:
    """Return the indices of nodes that must be in one segment with the node before."""
    values = {value.name: value for value in itertools.chain(graph.inputs, graph.outputs)}
    joined: set[int] = set()
    for past, present in state.items():
        ends = [
            index
            for index, (node, used) in enumerate(uses.items())
            if values[present] in node.outputs
            or (values[past] in used and (node.domain, node.op_type) != ("", "Shape"))
        ]
        joined.update(range(min(ends) + 1, max(ends) + 1))
    return joined


def _group(
    uses: _Uses, weights: _Weights, limit: int, joined: Collection[int]
) -> list[list[ir.Node]]:
    groups: list[list[ir.Node]] = [[]]
    held: frozenset[ir.Value] = frozenset()
    for index, (node, values) in enumerate(uses.items()):
        if all(output in weights for output in node.outputs):
            continue
        needed = _union(weights, values)
        if held and needed - held and index not in joined and _nbytes(held | needed) > limit:
            groups.append([])
            held = frozenset()
        groups[-1].append(node)
        held |= needed
    return groups


def _nbytes(weights: Iterable[ir.Value]) -> int:
    return sum(value.const_value.nbytes for value in weights if value.const_value is not None)
