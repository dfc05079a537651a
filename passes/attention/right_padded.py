"""What a graph for right-padded rows knows of them, computed once before its first node."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from onnxscript import BOOL, FLOAT, INT32, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET

RIGHT_PADDED = "right_padded"
REAL = 2
"""Which of its outputs says what tokens are real [batch, sequence]."""


@script(OPSET, default_opset=op)
def right_padded(
    attention_mask: INT64[...], input_ids: INT64[...]
) -> tuple[INT32[...], INT32[...], BOOL[...], BOOL[...], INT64[...]]:
    """Read a mask [batch, total] whose rows are ones, then zeros.

    Sizes are computed from shapes, on the CPU, and what depends on the mask's values stays on the
    GPU, so that nothing waits for a copy. A row may end in a 2 in place of its last 1: then the
    call's token of that row is padding, one column after it.

    Returns:
        The index of each row's last token [batch]; the number of columns; which of the call's
        tokens are real [batch, sequence]; which rows are as they must be [batch, 1]: of others no
        token is real; their lengths [batch, 1].
    """
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_ints=[0])
    lengths = op.ReduceSum(attention_mask, one, keepdims=1)
    # Never less than zero, for rows of nothing but padding.
    last = op.Squeeze(op.Cast(op.Max(op.Sub(lengths, one), zero), to=6), one)
    total = op.Shape(attention_mask, start=1, end=2)
    sequence = op.Shape(input_ids, start=1, end=2)
    before = op.Squeeze(op.Sub(total, sequence))
    batch = op.Shape(attention_mask, start=0, end=1)
    begin = op.Expand(one, op.Concat(batch, one, axis=0))
    previous = op.Concat(
        begin, op.Slice(attention_mask, zero, op.Constant(value_ints=[-1]), one), axis=1
    )
    rises = op.ReduceSum(op.Cast(op.Greater(attention_mask, previous), to=1), one, keepdims=1)
    valid = op.Less(rises, op.Constant(value_float=0.5))
    # The tokens of a call follow its past; the past of rows is of several lengths only where
    # there is one token each, which is a row's last whatever its column.
    step = op.Constant(value_int=1)
    start = op.Constant(value_int=0)
    columns = op.Range(before, op.Squeeze(total), step)
    within = op.Less(columns, lengths)
    first = op.Less(op.Range(start, op.Squeeze(sequence), step), op.Min(lengths, one))
    real = op.And(op.Or(within, first), valid)
    return last, op.Squeeze(op.Cast(total, to=6)), real, valid, lengths


@script(OPSET, default_opset=op)
def last_positions(
    hidden: FLOAT[...],
    attention_mask: INT64[...],
    lengths: INT64[...],
    valid: BOOL[...],
    keep: INT64[...],
) -> FLOAT[...]:
    """Return hidden states of the last `keep` real tokens of each row, of all columns for 0.

    Rows of fewer repeat their first. NaN stands for rows whose mask is not as it must be.
    """
    total = op.Shape(attention_mask, start=1, end=2)
    sequence = op.Shape(hidden, start=1, end=2)
    one = op.Constant(value_ints=[1])
    # Integers that begin with a shape are computed on the CPU. `wanted` is 0 for all columns.
    wanted = op.Min(keep, sequence)
    some = op.Min(wanted, op.Sub(op.Add(sequence, one), sequence))
    count = op.Add(wanted, op.Mul(sequence, op.Sub(one, some)))
    offset = op.Sub(op.Sub(sequence, total), count)
    step = op.Constant(value_int=1)
    of_past = op.Range(op.Squeeze(offset), op.Squeeze(op.Add(offset, count)), step)
    back = op.Sub(op.Sub(sequence, sequence), count)
    of_first = op.Range(op.Squeeze(back), op.Squeeze(op.Add(back, count)), step)
    begin = op.Mul(back, some)
    of_all = op.Range(op.Squeeze(begin), op.Squeeze(op.Add(begin, count)), step)
    columns = op.Max(
        op.Add(lengths, of_past),
        op.Add(op.Min(lengths, one), of_first),
        of_all,
        op.Constant(value_ints=[0]),
    )
    kept = op.GatherND(hidden, op.Unsqueeze(columns, op.Constant(value_ints=[2])), batch_dims=1)
    nan = op.CastLike(op.Constant(value_float=float("nan")), hidden)
    return op.Where(op.Unsqueeze(valid, op.Constant(value_ints=[2])), kept, nan)
