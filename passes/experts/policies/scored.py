"""Decisions by a score and a threshold: no token depends on another, even in single-stream decode.

The first candidate of a real token always runs, others whose score reaches the threshold of their
layer. What a score is differs; float32 operations and their order are those of the reference. A cap
limits what a whole call runs.
"""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

import math
from collections.abc import Sequence

from onnxscript import BOOL, DOUBLE, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def score_weight(weights: FLOAT[...], ids: INT64[...], sizes: FLOAT[...]) -> FLOAT[...]:
    """Return the router's weights [T, K]."""
    score = op.Identity(weights)
    return score


@script(OPSET, default_opset=op)
def score_ratio(weights: FLOAT[...], ids: INT64[...], sizes: FLOAT[...]) -> FLOAT[...]:
    """Return the weights [T, K] as shares of the token's first (NAEE, arXiv 2402.14800)."""
    one = op.Constant(value_ints=[1])
    first = op.Slice(weights, op.Constant(value_ints=[0]), one, one)
    return op.Div(weights, op.Max(first, op.Constant(value_float=1e-30)))


@script(OPSET, default_opset=op)
def score_top_p(weights: FLOAT[...], ids: INT64[...], sizes: FLOAT[...]) -> FLOAT[...]:
    """Return minus the summed weights [T, K] of the candidates ranked before."""
    return op.Neg(op.CumSum(weights, op.Constant(value_int=1), exclusive=1))


@script(OPSET, default_opset=op)
def score_price(weights: FLOAT[...], ids: INT64[...], sizes: FLOAT[...]) -> FLOAT[...]:
    """Return the weights [T, K] times the sizes [E] of their experts."""
    return op.Mul(op.Gather(sizes, ids, axis=0), weights)


@script(OPSET, default_opset=op)
def score_overlapping(
    weights: FLOAT[...], ids: INT64[...], sizes: FLOAT[...], twice_overlap: FLOAT[...]
) -> FLOAT[...]:
    """Return what a candidate costs if it is dropped after all those ranked behind it [T, K].

    With s = size times weight and t the sum of s behind it: sqrt(s (s + 2 overlap t)).
    """
    added = op.Mul(op.Gather(sizes, ids, axis=0), weights)
    behind = op.CumSum(added, op.Constant(value_int=1), exclusive=1, reverse=1)
    return op.Sqrt(op.Mul(added, op.Add(added, op.Mul(behind, twice_overlap))))


@script(OPSET, default_opset=op)
def scale_by_token(
    weights: FLOAT[...],
    ids: INT64[...],
    hidden: FLOAT[...],
    matrix: FLOAT[...],
    bias: FLOAT[...],
    limit: FLOAT[...],
) -> FLOAT[...]:
    """Multiply weights [T, K] by what hidden states [T, H] make of the sizes of their experts.

    That is the exponential of h A + b, which the limit bounds up and down; A is the ``matrix``
    [H, E].
    """
    logs = op.Clip(op.Add(op.MatMul(hidden, matrix), bias), op.Neg(limit), limit)
    return op.Mul(weights, op.Exp(op.GatherElements(logs, ids, axis=1)))


@script(OPSET, default_opset=op)
def keep_scored(
    scores: FLOAT[...], real: BOOL[...], threshold: FLOAT[...], others: Sequence[int]
) -> BOOL[...]:
    """Keep the first candidate of real tokens, and those whose score reaches the threshold.

    ``others`` is the shape [K - 1]. What candidates must reach [T, K] doesn't depend on the layer
    where the threshold doesn't: onnxruntime computes it once.
    """
    row = op.Concat(
        op.Constant(value_floats=[-math.inf]),
        op.Expand(threshold, op.Constant(value_ints=others)),
        axis=0,
    )
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    bar = op.Where(column, row, op.Constant(value_float=math.inf))
    return op.GreaterOrEqual(scores, bar)


@script(OPSET, default_opset=op)
def keep_scored_by_row(
    scores: FLOAT[...], real: BOOL[...], thresholds: FLOAT[...], others: Sequence[int]
) -> BOOL[...]:
    """Keep what `keep_scored` does, each sequence by a threshold of its own.

    ``thresholds`` are [B], or [1] for all. What candidates must reach is the same in all layers, so
    onnxruntime computes it once.
    """
    rows = op.Reshape(thresholds, op.Constant(value_ints=[-1, 1]))
    flat = op.Constant(value_ints=[-1, 1])
    by_token = op.Reshape(op.Expand(rows, op.Shape(real)), flat)
    first = op.Expand(op.Constant(value_float=-math.inf), op.Shape(by_token))
    row = op.Concat(first, op.Expand(by_token, op.Constant(value_ints=others)), axis=1)
    bar = op.Where(op.Reshape(real, flat), row, op.Constant(value_float=math.inf))
    return op.GreaterOrEqual(scores, bar)


@script(OPSET, default_opset=op)
def cap_call(scores: FLOAT[...], keep: BOOL[...], real: BOOL[...], quota: DOUBLE[...]) -> BOOL[...]:
    """Drop the lowest scores of a call that keeps too many.

    No more than floor(quota * real tokens) candidates besides the first ones stay, taken by rank
    from one sort: among equals the earlier token wins.
    """
    one = op.Constant(value_ints=[1])
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    end = op.Constant(value_ints=[2147483647])
    rest = op.Slice(scores, one, end, one)
    passed = op.Slice(keep, one, end, one)
    flat = op.Constant(value_ints=[-1])
    tokens = op.ReduceSum(op.Cast(op.Reshape(real, flat), to=7), keepdims=1)
    count = op.ReduceSum(op.Cast(op.Reshape(passed, flat), to=7), keepdims=1)
    room = op.Cast(op.Floor(op.Mul(op.Cast(tokens, to=11), quota)), to=7)
    # A score is never as low as this.
    competing = op.Where(passed, rest, op.Constant(value_float=-3e38))
    contest = op.Reshape(competing, flat)
    _, winners = op.TopK(contest, op.Min(count, room), axis=0)
    nobody = op.Less(contest, op.Constant(value_float=-3.3e38))
    won = op.GreaterOrEqual(winners, op.Constant(value_int=0))
    kept = op.ScatterElements(nobody, winners, won, axis=0)
    return op.Concat(column, op.Reshape(kept, op.Shape(rest)), axis=1)
