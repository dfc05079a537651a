"""Routing functions of the artifact: onnxscript around a policy, all stock operators."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def real_tokens(attention_mask: INT64[...], input_ids: INT64[...]) -> BOOL[...]:
    """Return [B, S]: which of this call's tokens are no padding.

    The mask [B, past + S] covers the past too.
    """
    start = op.Neg(op.Shape(input_ids, start=1, end=2))
    end = op.Constant(value_ints=[9223372036854775807])
    current = op.Slice(attention_mask, start, end, op.Constant(value_ints=[1]))
    return op.Cast(current, to=9)


@script(OPSET, default_opset=op)
def all_tokens(input_ids: INT64[...]) -> BOOL[...]:
    """Return [B, S], True: for graphs without an attention mask."""
    return op.GreaterOrEqual(input_ids, op.Constant(value_int=-9223372036854775807))


@script(OPSET, default_opset=op)
def rank_candidates(
    expert_weights: FLOAT[...], expert_ids: INT64[...], candidates: int
) -> tuple[FLOAT[...], INT64[...]]:
    """Return the best `candidates` of each token, best first; routers need not sort them."""
    weights, order = op.TopK(
        op.Cast(expert_weights, to=1),
        op.Reshape(op.Constant(value_int=candidates), op.Constant(value_ints=[1])),
        axis=1,
    )
    ids = op.GatherElements(expert_ids, order, axis=1)
    return weights, ids


@script(OPSET, default_opset=op)
def first_candidates(
    expert_weights: FLOAT[...], expert_ids: INT64[...], candidates: int
) -> tuple[FLOAT[...], INT64[...]]:
    """Return the best `candidates` of each token if the router has sorted them."""
    axis = op.Constant(value_ints=[1])
    start = op.Constant(value_ints=[0])
    end = op.Reshape(op.Constant(value_int=candidates), op.Constant(value_ints=[1]))
    weights = op.Cast(op.Slice(expert_weights, start, end, axis), to=1)
    return weights, op.Slice(expert_ids, start, end, axis)


@script(OPSET, default_opset=op)
def renormalize(expert_weights: FLOAT[...], weights: FLOAT[...], keep: BOOL[...]) -> FLOAT[...]:
    """Scale the kept `weights` to the sum that all of a token's candidates have."""
    axis = op.Constant(value_ints=[1])
    kept = op.Where(keep, weights, op.Constant(value_float=0.0))
    total = op.ReduceSum(op.Cast(expert_weights, to=1), axis, keepdims=1)
    # Padding keeps nothing; whatever it is scaled by stays unused.
    share = op.Max(op.ReduceSum(kept, axis, keepdims=1), op.Constant(value_float=1e-30))
    return op.Mul(weights, op.Div(total, share))


@script(OPSET, default_opset=op)
def mask_lowering(
    weights: FLOAT[...],
    ids: INT64[...],
    keep: BOOL[...],
    real: BOOL[...],
    experts: int,
    dropped: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    """Return router probabilities [T, E] and row sums [T, 1] for an MoE op with k = K.

    The op takes the softmax over its top k: of log weights it returns the weights divided by their
    sum, and an expert at `dropped` gets exactly zero, which onnxruntime's CPU kernel skips. A
    padding token keeps nothing; all of its experts at `dropped` would tie and run, so one is let
    through with a row sum of zero.
    """
    tiny = op.Constant(value_float=1e-38)
    low = op.Constant(value_float=dropped)
    logits = op.Where(keep, op.Log(op.Max(weights, tiny)), low)
    axis = op.Constant(value_ints=[1])
    total = op.ReduceSum(op.Where(keep, weights, op.Constant(value_float=0.0)), axis, keepdims=1)
    first = op.Slice(logits, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), axis)
    others = op.Slice(
        logits, op.Constant(value_ints=[1]), op.Constant(value_ints=[2147483647]), axis
    )
    # Every real token keeps its best candidate, so a first column at `dropped` is padding.
    padding = op.LessOrEqual(first, low)
    safe = op.Concat(op.Where(padding, op.Constant(value_float=0.0), first), others, axis=1)
    # Of `real`, not of `ids`, so that onnxruntime finds it the same in all layers.
    one = op.Constant(value_ints=[1])
    rows, width = op.Reshape(op.Size(real), one), op.Reshape(op.Constant(value_int=experts), one)
    empty = op.Expand(low, op.Concat(rows, width, axis=0))
    return op.ScatterElements(empty, ids, safe, axis=1), total


@script(OPSET, default_opset=op)
def dense_weights(
    weights: FLOAT[...], ids: INT64[...], keep: BOOL[...], real: BOOL[...], experts: int
) -> FLOAT[...]:
    """Return every token's weight of every expert [T, E], zero where dropped.

    For an operator that takes weights as they are: onnxruntime's CPU QMoE skips experts of weight
    zero, all of them for padding. A router may give a candidate no weight; that it was kept still
    shows.
    """
    zero = op.Constant(value_float=0.0)
    seen = op.Max(weights, op.Constant(value_float=1e-30))
    # Of `real`, not of `ids`, so that onnxruntime finds it the same in all layers.
    one = op.Constant(value_ints=[1])
    rows, width = op.Reshape(op.Size(real), one), op.Reshape(op.Constant(value_int=experts), one)
    empty = op.Expand(zero, op.Concat(rows, width, axis=0))
    return op.ScatterElements(empty, ids, op.Where(keep, seen, zero), axis=1)
