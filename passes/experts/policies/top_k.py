"""No redistribution: a token keeps all candidates it is given, which are the k best."""

# onnxscript is a language of its own: its values have no Python type for mypy to check.
# mypy: disable-error-code="arg-type, misc, return-value, type-arg, type-var"
from __future__ import annotations

from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from alloc_moe.passes.base import OPSET


@script(OPSET, default_opset=op)
def keep_all(weights: FLOAT[...], ids: INT64[...], real: BOOL[...], k: int) -> BOOL[...]:
    """Keep every candidate of every real token."""
    column = op.Reshape(real, op.Constant(value_ints=[-1, 1]))
    width = op.Reshape(op.Constant(value_int=k), op.Constant(value_ints=[1]))
    keep = op.Expand(column, op.Concat(op.Constant(value_ints=[1]), width, axis=0))
    return keep
