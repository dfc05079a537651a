"""Routing for CUDA: rows for an operator with k = 1, of static sizes where tokens are few."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def route_rows(
    weights: FLOAT[...],
    ids: INT64[...],
    keep: BOOL[...],
    candidates: int,
    experts: int,
    dropped: float,
    spare: float,
    few: int,
) -> tuple[INT64[...], FLOAT[...], INT64[...], FLOAT[...]]:
    """Return what an MoE op with k = 1 needs to run the kept pairs.

    Up to `few` tokens have a row for each candidate; a dropped one is sent to its token's best
    expert, which costs nothing where that runs anyway, and no size depends on values. More are
    compacted: so the number of rows has to be waited for, once. One row is never left out, as the
    operator takes no less.

    Returns:
        token [M]: of each row; router probabilities [M, E]: log weights, `spare` instead of 0 for
        what isn't kept, `dropped` for other experts; slots [T, K]: the row of each candidate, of
        its token's best one where it was dropped; weights [T, K], zero where dropped.
    """
    width = op.Constant(value_int=candidates)
    count = op.Size(ids)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    flat = op.Constant(value_ints=[-1])
    column = op.Constant(value_ints=[-1, 1])
    numbers = op.Range(zero, count, one)
    best = op.Slice(
        ids, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[1])
    )
    tokens = op.Squeeze(op.Shape(ids, start=0, end=1))
    if op.LessOrEqual(tokens, op.Constant(value_int=few)):
        token = op.Div(numbers, width)
        expert = op.Reshape(op.Where(keep, ids, best), column)
        taken = op.Reshape(keep, column)
        slots = op.Reshape(numbers, op.Shape(ids))
    else:
        through = op.Or(op.Reshape(keep, flat), op.Equal(numbers, zero))
        pair = op.Squeeze(op.NonZero(through), op.Constant(value_ints=[0]))
        token = op.Div(pair, width)
        expert = op.Reshape(op.Gather(op.Reshape(ids, flat), pair), column)
        taken = op.Reshape(op.Gather(op.Reshape(keep, flat), pair), column)
        place = op.Sub(op.CumSum(op.Cast(through, to=7), zero), one)
        places = op.Reshape(place, op.Shape(ids))
        first = op.Slice(
            places,
            op.Constant(value_ints=[0]),
            op.Constant(value_ints=[1]),
            op.Constant(value_ints=[1]),
        )
        slots = op.Where(keep, places, first)
    named = op.Range(zero, op.Constant(value_int=experts), one)
    own = op.Where(taken, op.Constant(value_float=0.0), op.Constant(value_float=spare))
    probabilities = op.Where(op.Equal(expert, named), own, op.Constant(value_float=dropped))
    shares = op.Where(keep, weights, op.Constant(value_float=0.0))
    return token, probabilities, slots, shares


@script(OPSET, default_opset=op)
def combine_rows(outputs: FLOAT[...], weights: FLOAT[...], slots: INT64[...]) -> FLOAT[...]:
    """Return [T, H]: each token's weighted sum of the rows of its candidates."""
    one = op.Constant(value_ints=[1])
    shares = op.Unsqueeze(op.CastLike(weights, outputs), one)
    return op.Squeeze(op.MatMul(shares, op.Gather(outputs, slots, axis=0)), one)


@script(OPSET, default_opset=op)
def route_tokens(
    weights: FLOAT[...],
    ids: INT64[...],
    keep: BOOL[...],
    experts: int,
    dropped: float,
    spare: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    """Return router probabilities [T, E] and row sums [T, 1] for an MoE op that runs all of `ids`.

    The op takes the softmax over its top k. Logarithms are of shares of the first weight: rounding
    them to 16 bits then errs least where weights are largest. Padding runs, at `spare`.
    """
    tiny = op.Constant(value_float=1e-38)
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    logs = op.Log(op.Max(weights, tiny))
    ratios = op.Where(
        keep, op.Sub(logs, op.Slice(logs, zero, one, one)), op.Constant(value_float=spare)
    )
    named = op.Range(
        op.Constant(value_int=0), op.Constant(value_int=experts), op.Constant(value_int=1)
    )
    last = op.Constant(value_ints=[2])
    chosen = op.Equal(op.Unsqueeze(ids, last), named)
    spread = op.Where(chosen, op.Unsqueeze(ratios, last), op.Constant(value_float=dropped))
    total = op.ReduceSum(op.Where(keep, weights, op.Constant(value_float=0.0)), one, keepdims=1)
    return op.ReduceMax(spread, one, keepdims=0), total


@script(OPSET, default_opset=op)
def sum_kept(weights: FLOAT[...], keep: BOOL[...]) -> FLOAT[...]:
    """Return [T, 1]: the sum of the weights that a token keeps."""
    kept = op.Where(keep, weights, op.Constant(value_float=0.0))
    return op.ReduceSum(kept, op.Constant(value_ints=[1]), keepdims=1)


@script(OPSET, default_opset=op)
def mask_padding(logits: FLOAT[...], real: BOOL[...], spare: float) -> FLOAT[...]:
    """Return router logits [T, E], all of them `spare` for padding."""
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    return op.Where(column, logits, op.CastLike(op.Constant(value_float=spare), logits))
