"""Rewriting by operator gives what onnxscript's own matching gives."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter._matcher import SimplePatternMatcher

from alloc_moe.compiler.export.matching import matching_by_operator

# Two transposes that cancel out and a reshape of a reshape; what is cut in two is only for RULE.
GRAPH = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[2, 8] x) => (float[2, 4] low, float[2, 4] high, float[2, 8] same, float[4, 4] shaped)
    <int64[1] zero = {0}, int64[1] half = {4}, int64[1] whole = {8}, int64[1] axis = {1},
     int64[2] rows = {8, 2}, int64[2] square = {4, 4}>
    {
      low = Slice (x, zero, half, axis)
      high = Slice (x, half, whole, axis)
      turned = Transpose <perm = [1, 0]> (x)
      back = Transpose <perm = [1, 0]> (turned)
      same = Neg (back)
      reshaped = Reshape (x, rows)
      shaped = Reshape (reshaped, square)
    }
"""

RULE = pattern.RewriteRule(
    lambda op, x, a, b, c, axis: (op.Slice(x, a, b, axis), op.Slice(x, b, c, axis)),
    lambda op, x, a, b, c, axis: (op.Sin(x), op.Cos(x)),
)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one entry for each try of a pattern on a node."""
    tries: list[int] = []
    prepare = SimplePatternMatcher._init_match

    def counted(matcher: SimplePatternMatcher, verbose: int) -> None:
        tries.append(1)
        prepare(matcher, verbose)

    monkeypatch.setattr(SimplePatternMatcher, "_init_match", counted)
    return tries


@pytest.mark.parametrize(
    ("rules", "operators"),
    [
        (None, ["Identity", "Neg", "Reshape", "Slice", "Slice"]),
        ([RULE], ["Cos", "Neg", "Reshape", "Reshape", "Sin", "Transpose", "Transpose"]),
    ],
    ids=["the library's", "a pattern with two ends"],
)
def test_graphs_are_rewritten_as_without_it(
    rules: list[pattern.RewriteRule] | None, operators: list[str]
) -> None:
    plain, ours = ir.from_onnx_text(GRAPH), ir.from_onnx_text(GRAPH)
    rewrite(plain, rules)
    with matching_by_operator():
        rewrite(ours, rules)
    assert ir.to_onnx_text(ours) == ir.to_onnx_text(plain)
    assert sorted(node.op_type for node in ours.graph) == operators


def test_a_pattern_is_tried_on_its_operator_alone(tried: list[int]) -> None:
    def tries() -> int:
        tried.clear()
        rewrite(ir.from_onnx_text(GRAPH))
        return len(tried)

    plain = tries()
    with matching_by_operator():
        assert 0 < tries() < plain / 5
    assert tries() == plain
