"""Keep keys and values as 8-bit integers between calls."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from alloc_moe.passes.attention.group_query import group_attention
from alloc_moe.passes.base import DOMAIN, add_initializer

CacheScales = Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""By number of the cache slot, one step of its keys and values [key/value heads, head size]."""

_SLOT = re.compile(r"past_key_values\.(\d+)\.key")
_BITS = 8
_SCALES = (12, 13)  # the operator's inputs k_scale and v_scale


class QuantizeCachePass(ir.passes.InPlacePass):
    """Quantise the cache of ``GroupQueryAttention``: what it writes, it rounds to int8 by channel.

    Args:
        scales: What one step is worth. Without any, nothing is changed.
    """

    def __init__(self, scales: CacheScales) -> None:
        self._scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(group_attention(model)) if self._scales else []:
            if "kv_cache_bit_width" not in node.attributes:
                self._quantize(model, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def _quantize(self, model: ir.Model, node: ir.Node) -> None:
        slot = _slot(node)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", _BITS)
        node.resize_inputs(max(len(node.inputs), _SCALES[-1] + 1))
        for kind, at, scale in zip(("k", "v"), _SCALES, self._scales[slot], strict=True):
            name = f"{kind}_quant_type"
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            tensor = ir.tensor(scale[None, :, None], name=f"{DOMAIN}.{kind}_scale.{slot}")
            node.replace_input_with(at, add_initializer(model, tensor))
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)

    def ensures(self, model: ir.Model) -> None:
        nodes = list(group_attention(model)) if self._scales else []
        left = [_slot(node) for node in nodes if "kv_cache_bit_width" not in node.attributes]
        if left:
            raise ir.passes.PostconditionError(f"The cache slots {left} are not quantised.")


def _slot(node: ir.Node) -> int:
    past = node.inputs[3]
    match = _SLOT.fullmatch(past.name or "") if past is not None else None
    assert match is not None
    return int(match[1])
