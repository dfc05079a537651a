"""Token-level redistribution (Alloc-T): tokens compete for a layer's activations.

Every real token keeps its best candidate; the others' weights form pools, in each of which the
(k - 1) * tokens largest win. Alloc-MoE, arXiv 2604.08133.
"""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from collections.abc import Sequence

from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def keep_pooled(
    weights: FLOAT[...],
    ids: INT64[...],
    real: BOOL[...],
    k: int,
    pool_shape: Sequence[int],
) -> BOOL[...]:
    """Keep the winners of each pool.

    ``pool_shape`` reshapes [B, S] tokens into pools: [1, -1] makes one pool of the whole call,
    [0, -1] one of each sequence. A pool of n real tokens has exactly (k - 1) * n winners, taken by
    rank from one sort, so that ties can't exceed the budget: among equals the earlier token wins.
    """
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
    most = op.ReduceMax(winners, keepdims=0)
    _, order = op.TopK(by_pool, op.Reshape(most, op.Constant(value_ints=[1])), axis=1)
    ranks = op.Range(op.Constant(value_int=0), most, op.Constant(value_int=1))
    won = op.Less(ranks, winners)
    nobody = op.Less(by_pool, op.Constant(value_float=-2.0))
    kept = op.ScatterElements(nobody, order, won, axis=1)
    return op.Concat(column, op.Reshape(kept, op.Shape(rest)), axis=1)
