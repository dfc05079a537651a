"""The experts' gate as attributes of onnxruntime's MoE operators."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir


def swiglu(node: ir.Node) -> dict[str, Any]:
    """Return the attributes by which `MoE` and `QMoE` compute the gate of a RoutedExperts node.

    That node's are those of ``gate * sigmoid(alpha * gate) * (up + beta)``, and ``limit``, where
    gate and up are cut; without them it is SiLU.
    """
    alpha, beta, limit = (
        node.attributes[name].as_float() if name in node.attributes else default
        for name, default in (("alpha", 1.0), ("beta", 0.0), ("limit", math.inf))
    )
    attributes: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": alpha,
        "activation_beta": beta,
    }
    return attributes if math.isinf(limit) else {**attributes, "swiglu_limit": limit}
