"""What deviates from the generic MoE layer: the one table of special cases.

A model needs no row here if its experts module follows transformers' fused layout
(`use_experts_implementation`) with SiLU gating, and if it exports.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """Gating ``(up + beta) * gate * sigmoid(alpha * gate)``, both clamped at ``limit`` if it isn't 0."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0


SILU_GATE = Gate()

UNSUPPORTED: dict[str, str] = {
    "phimoe": (
        "its router always picks 2 experts by sparsemixer, whatever the configuration says, so there is nothing "
        "to allocate"
    ),
    "llama4": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
    "llama4_text": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
    "gpt_oss": (
        "its attention sinks have no operator in onnxruntime's CPU provider that the exporter can target"
    ),
}
"""Model type -> why it can't be compiled, as the end of a sentence."""
