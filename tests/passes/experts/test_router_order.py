"""Which routers are known to give their candidates best first."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from alloc_moe.passes.experts.router_order import is_ranked

RANKED = {
    "as they come": "weights = Identity(logits)\n w, ids = TopK(weights, k)",
    "softmax": "scores = Softmax(logits)\n w, ids = TopK(scores, k)",
    "softmax of the best": "best, ids = TopK(logits, k)\n w = Softmax(best)",
    "renormalised": """scores = Softmax(logits)
        best, ids = TopK(scores, k)
        total = ReduceSum<keepdims=1>(best, axis)
        w = Div(best, total)""",
    "renormalised and scaled": """scores = Sigmoid(logits)
        best, ids = TopK(scores, k)
        total = ReduceSum<keepdims=1>(best, axis)
        some = Add(total, tiny)
        share = Div(best, some)
        w = Mul(share, two)""",
}
UNRANKED = {
    "unsorted": "w, ids = TopK<sorted=0>(logits, k)",
    "smallest": "w, ids = TopK<largest=0>(logits, k)",
    "of another": "w, others = TopK(logits, k)\n best, ids = TopK(logits, k)",
    "gathered": """biased = Add(logits, two)
        best, ids = TopK(biased, k)
        w = GatherElements<axis=1>(logits, ids)""",
    "a sum of any sign": """best, ids = TopK(logits, k)
        total = ReduceSum<keepdims=1>(best, axis)
        w = Div(best, total)""",
    "a negative factor": "best, ids = TopK(logits, k)\n w = Mul(best, minus)",
    "a factor each": """scores = Softmax(logits)
        best, ids = TopK(scores, k)
        w = Mul(best, best)""",
    "the other way up": """best, ids = TopK(logits, k)
        w = Neg(best)""",
}


def ranked(body: str) -> bool:
    proto = onnx.parser.parse_model(f"""
<ir_version: 10, opset_import: ["" : 23]>
g (float[t, 6] logits) => (float[t, 4] w, int64[t, 4] ids)
<int64[1] k = {{4}}, int64[1] axis = {{-1}}, float two = {{2}}, float tiny = {{1e-20}},
 float minus = {{-1}}>
{{
  {body}
}}
""")
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph
    return is_ranked(graph.outputs[0], graph.outputs[1])


@pytest.mark.parametrize("router", RANKED)
def test_sorting_routers_are_recognised(router: str) -> None:
    assert ranked(RANKED[router])


@pytest.mark.parametrize("router", UNRANKED)
def test_others_are_not_trusted(router: str) -> None:
    assert not ranked(UNRANKED[router])


def test_inputs_of_the_graph_are_not_trusted() -> None:
    value = ir.val("x", ir.DataType.FLOAT, ["t", 4])
    assert not is_ranked(value, value)
    assert not is_ranked(None, None)
