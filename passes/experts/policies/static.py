"""Policies without a size that depends on values, which a GPU would have to be asked for.

They sort whole pools, and decide by rank who wins; the results are those of `pooled` and `scored`.
"""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from collections.abc import Sequence

from onnxscript import BOOL, DOUBLE, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def keep_pooled_static(
    weights: FLOAT[...],
    ids: INT64[...],
    real: BOOL[...],
    k: int,
    pool_shape: Sequence[int],
) -> BOOL[...]:
    """Keep the winners of each pool, as `keep_pooled` does."""
    pools = op.Reshape(real, op.Constant(value_ints=pool_shape))
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    rest = op.Slice(
        weights,
        op.Constant(value_ints=[1]),
        op.Constant(value_ints=[2147483647]),
        op.Constant(value_ints=[1]),
    )
    # Weights are never negative: a padding token's -1 loses against every real one.
    competing = op.Where(column, rest, op.Constant(value_float=-1.0))
    width = op.Mul(op.Shape(pools, start=1, end=2), op.Shape(rest, start=1, end=2))
    by_pool = op.Reshape(competing, op.Concat(op.Shape(pools, start=0, end=1), width, axis=0))
    tokens = op.ReduceSum(op.Cast(pools, to=7), op.Constant(value_ints=[1]), keepdims=1)
    winners = op.Mul(tokens, op.Sub(op.Constant(value_int=k), op.Constant(value_int=1)))
    _, order = op.TopK(by_pool, width, axis=1)
    ranks = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    won = op.Less(ranks, winners)
    nobody = op.Less(by_pool, op.Constant(value_float=-2.0))
    kept = op.ScatterElements(nobody, order, won, axis=1)
    return op.Concat(column, op.Reshape(kept, op.Shape(rest)), axis=1)


@script(OPSET, default_opset=op)
def cap_call_static(
    scores: FLOAT[...], keep: BOOL[...], real: BOOL[...], quota: DOUBLE[...]
) -> BOOL[...]:
    """Drop the lowest scores of a call that keeps too many, as `cap_call` does."""
    one = op.Constant(value_ints=[1])
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    end = op.Constant(value_ints=[2147483647])
    rest = op.Slice(scores, one, end, one)
    passed = op.Slice(keep, one, end, one)
    flat = op.Constant(value_ints=[-1])
    tokens = op.ReduceSum(op.Cast(op.Reshape(real, flat), to=7), keepdims=1)
    room = op.Cast(op.Floor(op.Mul(op.Cast(tokens, to=11), quota)), to=7)
    # A score is never as low as this.
    contest = op.Reshape(op.Where(passed, rest, op.Constant(value_float=-3e38)), flat)
    size = op.Size(rest)
    _, order = op.TopK(contest, op.Reshape(size, one), axis=0)
    won = op.Less(op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1)), room)
    nobody = op.Less(contest, op.Constant(value_float=-3.3e38))
    ranked = op.Reshape(op.ScatterElements(nobody, order, won, axis=0), op.Shape(rest))
    return op.Concat(column, op.And(ranked, passed), axis=1)
