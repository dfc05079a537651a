"""The experts' gate as attributes of onnxruntime's MoE operators."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

_SILU = (1.0, 0.0, math.inf)


def swiglu(node: ir.Node) -> dict[str, Any]:
    """Return the attributes by which `MoE` and `QMoE` compute the gate of a RoutedExperts node.

    That node's are those of ``gate * sigmoid(alpha * gate) * (up + beta)``, and ``limit``, where
    gate and up are cut; without them it is SiLU.
    """
    alpha, beta, limit = _gate(node)
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": alpha,
        "activation_beta": beta,
    }
    return attributes if math.isinf(limit) else {**attributes, "swiglu_limit": limit}


def is_silu(node: ir.Node) -> bool:
    """Whether the gate of a RoutedExperts node is ``silu(gate) * up``, neither of them cut."""
    return _gate(node) == _SILU


def _gate(node: ir.Node) -> tuple[float, ...]:
    """Return alpha, beta and limit of a RoutedExperts node."""
    return tuple(
        node.attributes[name].as_float() if name in node.attributes else default
        for name, default in zip(("alpha", "beta", "limit"), _SILU, strict=True)
    )
