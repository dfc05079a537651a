"""Names and small helpers that the passes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OnnxFunction
from onnxscript.values import Opset

DOMAIN = "alloc_moe"
MICROSOFT = "com.microsoft"
OPSET = Opset(DOMAIN, 1)
ROUTED_EXPERTS = "RoutedExperts"
GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS = 3, 4, 5, 6
"""Inputs of a RoutedExperts node: what comes before are hidden states, ids and weights."""


def routed_experts(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the RoutedExperts nodes in graph order."""
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == ROUTED_EXPERTS:
            yield node


def lazy_tensor(
    compute: Callable[[], np.ndarray], shape: Sequence[int], dtype: ir.DataType, name: str
) -> ir.LazyTensor:
    """Return a tensor that `compute` makes when it is written; nothing keeps it afterwards."""
    return ir.LazyTensor(
        lambda: ir.Tensor(compute(), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )


def lazy_parts(
    compute: Callable[[], Sequence[np.ndarray]],
    specifications: Sequence[tuple[str, Sequence[int], ir.DataType]],
) -> list[ir.LazyTensor]:
    """Return tensors that one call of `compute` makes together, as (name, shape, type) say.

    What one computation gave is kept until it was read, so that weights written one after another
    are computed once; a part read again is computed again.
    """
    made: dict[int, np.ndarray] = {}

    def part(index: int) -> np.ndarray:
        if index not in made:
            made.update(enumerate(compute()))
        return made.pop(index)

    return [
        lazy_tensor(functools.partial(part, index), shape, dtype, name)
        for index, (name, shape, dtype) in enumerate(specifications)
    ]


def add_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` under its name and return its value."""
    assert tensor.name is not None
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.initializers[tensor.name] = value
    return value


def shared_integers(model: ir.Model, name: str, *numbers: int) -> ir.Value:
    """Return the int64 initializer ``alloc_moe.NAME`` of these numbers, made when first asked."""
    name = f"{DOMAIN}.{name}"
    known = model.graph.initializers.get(name)
    return known or add_initializer(model, ir.tensor(np.array(numbers, np.int64), name=name))


def add_function(model: ir.Model, function: OnnxFunction[..., Any]) -> None:
    """Make `function` a model-local function of `model`, which onnxruntime inlines."""
    if (DOMAIN, function.name, "") in model.functions:
        return
    local = ir.serde.deserialize_function(function.to_function_proto())
    model.functions[local.identifier()] = local
    model.opset_imports.setdefault(DOMAIN, OPSET.version)
