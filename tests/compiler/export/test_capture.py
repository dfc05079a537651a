"""What graphs for CUDA are made of: nothing in decode waits for a value, nothing is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from alloc_moe.compiler.export.specialize import specialize
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.runtime.artifact.plan import AllocationPlan

FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"]
# Arguments that onnxruntime's CUDA kernels take from the host.
ON_HOST = {
    "Expand": {1},
    "GroupQueryAttention": {6},
    "If": {0},
    "Range": {0, 1, 2},
    "ReduceMax": {1},
    "ReduceSum": {1},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "TopK": {1},
    "Unsqueeze": {1},
    "CumSum": {1},
}
OF_SHAPES = {"Shape", "Size"}


def inlined(model: ir.Model) -> onnx.GraphProto:
    proto = ir.to_proto(model)
    return onnx.inliner.inline_local_functions(proto).graph


def branches(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def obstacles(graph: onnx.GraphProto) -> list[str]:
    """Return what makes a call of few tokens wait for the GPU, or copies to it."""
    constants = {weight.name for weight in graph.initializer}
    host = {"alloc_moe.logits_to_keep"}
    return list(_obstacles(graph.node, constants, host))


def _obstacles(nodes: Iterable[Any], constants: set[str], host: set[str]) -> Iterable[str]:
    """Follow what is on the host: shapes, and integers computed of shapes alone."""
    for node in nodes:
        given = {index: name for index, name in enumerate(node.input) if name}
        from_host = {name for name in given.values() if name in host}
        if node.op_type == "Constant":
            constants.update(node.output)
            continue
        if node.op_type in ("NonZero", "Loop", "Scan", "Unique", "Compress"):
            yield f"{node.op_type} has a size that depends on values"
        if node.op_type in OF_SHAPES:
            host.update(node.output)
            continue
        if given and set(given.values()) <= constants:
            constants.update(node.output)
            continue
        taken = ON_HOST.get(node.op_type, set())
        for index, name in given.items():
            if index in taken and name not in host | constants:
                yield f"{node.op_type} waits for {name}"
        others = {name for index, name in given.items() if index not in taken}
        if others and others <= host | constants and others & host - {"alloc_moe.logits_to_keep"}:
            host.update(node.output)
        elif copied := others & from_host:
            yield f"{node.op_type} copies {sorted(copied)} to the GPU"
        if node.op_type == "If":
            inside = branches(node)["then_branch"]
            constants.update(weight.name for weight in inside.initializer)
            yield from _obstacles(inside.node, constants, host)


@pytest.mark.parametrize("redistribution", ["none", "batch", "sequence", "price"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_decode_waits_for_the_gpu(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
    score_plan: Callable[..., AllocationPlan],
    family: str,
    redistribution: Any,
) -> None:
    moe = moe_model(family)
    if redistribution == "price":
        plan = score_plan(moe, redistribution, overlap=0.5)
    else:
        plan = plan_for(moe, [2] * len(moe.layers), redistribution=redistribution)
    graph = inlined(specialize(exported(family), plan, device="cuda"))
    assert obstacles(graph) == []


def test_what_waits_is_found() -> None:
    graph = onnx.parser.parse_graph("""
        g (float[n] x, int64[1] k) => (float[m] y) {
          size = ReduceMax<keepdims=1>(k)
          y, order = TopK(x, size)
          rows = NonZero(y)
          shape = Shape(x)
          sum = Add(rows, shape)
        }
    """)
    assert obstacles(graph) == [
        "TopK waits for size",
        "NonZero has a size that depends on values",
        "Add copies ['shape'] to the GPU",
    ]


def test_a_layer_is_a_handful_of_nodes(
    exported: Callable[[str], ir.Model],
    moe_model: Callable[[str], MoeModel],
    plan_for: Callable[..., AllocationPlan],
) -> None:
    moe = moe_model("olmoe")
    layers = len(moe.layers)
    plan = plan_for(moe, [4] * layers, redistribution="none")
    model = specialize(exported("olmoe"), plan, device="cuda")
    found = Counter(node.op_type for node in model.graph)
    assert {name: found[name] / layers for name in ("FusedMatMul", "Split", "MoE")} == {
        "FusedMatMul": 2 + 1 / layers,  # queries, keys and values; the output; and the head
        "Split": 1,
        "MoE": 1,
    }
    assert found["GroupQueryAttention"] == layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert not {"RotaryEmbedding", "Attention", "Transpose", "Where", "Slice"} & set(found)
    assert {identifier[1] for identifier in model.functions} == {
        "right_padded",
        "last_positions",
        "mask_padding",
        "keep_all",
        "sum_kept",
    }
