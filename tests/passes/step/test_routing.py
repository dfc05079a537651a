"""Routers are recognised by what they compute, whatever their names."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from alloc_moe.passes.step.matching import NotExpressibleError
from alloc_moe.passes.step.operators.routing import match_router
from alloc_moe.passes.step.parts import Groups, Router

HEAD = """
<ir_version: 10, opset_import: ["": 23, "alloc_moe": 1]>
g (float[T, 16] x, float[8, 16] w, float[E, 2, 16] up, float[E, 16, 1] down) => (float[T, 16] y)
<float[8] b = {0, 0, 0, 0, 0, 0, 0, 1}, int64[1] four = {4}, int64[1] two = {2},
 int64[1] last = {-1}, float scale = {1.5}, float eps = {1e-20}, float none = {0},
 int64[3] split = {-1, 4, 2}, int64[2] flat = {-1, 8}, int64[3] wide = {1, 4, 2}>
{
"""
TAIL = """
  y = alloc_moe.RoutedExperts <layer = 0> (x, i, r, up, , down)
}
"""
LOGITS = "l = Gemm <transB = 1> (x, w)\n"
TOP = "v, i = TopK <axis = -1> (s, four)\n"
RENORMALIZED = "t = ReduceSum <keepdims = 1> (v, last)\nr = Div (v, t)\n"
GROUPED = """
  f = Reshape (c, split)
  m = ReduceMax (f, last)
  q, j = TopK (m, two)
  z = Shape (m)
  e = Expand (none, z)
  o = Shape (j)
  n = ConstantOfShape <value: tensor = float[1] {1}> (o)
  p = ScatterElements <axis = 1> (e, j, n)
  u = Unsqueeze (p, last)
  k = Expand (u, wide)
  a = Reshape (k, flat)
  d = Cast <to = 9> (a)
  g0 = Not (d)
  s1 = Where (g0, none, c)
"""


def routed(body: str) -> ir.Node:
    model = ir.from_onnx_text(HEAD + body + TAIL)
    node = next(node for node in model.graph if node.op_type == "RoutedExperts")
    for value, dims in (("i", ("T", 4)), ("j", ("T", 2)), ("m", ("T", 4))):
        for found in (output for each in model.graph for output in each.outputs):
            if found.name == value:
                found.shape = ir.Shape(dims)
    for found in (output for each in model.graph for output in each.outputs):
        if found.dtype is None:
            found.type = ir.TensorType(ir.DataType.FLOAT)
    return node


def router(body: str) -> Router:
    return match_router(routed(body)).router


PLAIN = Router(4, "softmax", rounded=False, rounded_logits=False)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Softmax (l)\n" + TOP + "r = Identity (v)\n", PLAIN),
        ("s = Softmax (l)\n" + TOP + RENORMALIZED, {"renormalize": True}),
        ("s = Sigmoid (l)\n" + TOP + "r = Mul (v, scale)\n", {"score": "sigmoid", "scale": 1.5}),
        ("s = Identity (l)\n" + TOP + "r = Softmax (v)\n", {"score": "softmax_after_top_k"}),
        (
            "c = Sigmoid (l)\ns = Add (c, b)\n"
            + TOP
            + "g1 = GatherElements <axis = 1> (c, i)\nt = ReduceSum (g1, last)\n"
            + "t1 = Add (t, eps)\nr1 = Div (g1, t1)\nr = Mul (r1, scale)\n",
            {
                "score": "sigmoid",
                "selection_bias": "b",
                "renormalize": True,
                "renormalize_eps": pytest.approx(1e-20),
                "scale": 1.5,
            },
        ),
        (
            "c = Softmax (l)\n" + GROUPED + "s = Identity (s1)\n" + TOP + "r = Mul (v, scale)\n",
            {"groups": Groups(4, 2, 1), "scale": 1.5},
        ),
    ],
    ids=["softmax", "renormalised", "sigmoid", "after", "biased", "groups"],
)
def test_routers_are_told_apart(body: str, expected: Router | dict[str, object]) -> None:
    found = router(LOGITS + body)
    if isinstance(expected, Router):
        assert found == expected
        return
    for name, value in expected.items():
        assert getattr(found, name) == value
    others = set(vars(PLAIN)) - set(expected)
    assert all(getattr(found, name) == getattr(PLAIN, name) for name in others)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = Softmax <axis = 0> (l)\n" + TOP + "r = Identity (v)\n", "a softmax over tokens"),
        ("s = Softmax (l)\n" + TOP + "r = Relu (v)\n", "weights go through Relu"),
        ("s = Tanh (l)\n" + TOP + "r = Identity (v)\n", "other scores than it chooses by"),
        (
            "s = Softmax (l)\nv, i = TopK <largest = 0> (s, four)\nr = Identity (v)\n",
            "by more than one TopK",
        ),
        (
            "s = Softmax (l)\nc = Sigmoid (l)\n" + TOP + "r = GatherElements <axis = 1> (c, i)\n",
            "other scores than it chooses by",
        ),
    ],
)
def test_what_has_no_words_is_said(body: str, reason: str) -> None:
    with pytest.raises(NotExpressibleError, match=reason):
        router(LOGITS + body)
