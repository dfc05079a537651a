"""What deviates from the generic MoE layer: the one table of special cases.

A model needs no row here if its experts module follows transformers' fused layout
(`use_experts_implementation`) with SiLU gating, and if it exports.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

UNSUPPORTED: dict[str, str] = {
    "phimoe": (
        "its router always picks 2 experts by sparsemixer, whatever the configuration says, "
        "so there is nothing to allocate"
    ),
    "llama4": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
    "gpt_oss": (
        "its experts clamp their gate and its cache holds sliding windows, neither of which is "
        "lowered yet"
    ),
    "llama4_text": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
}
"""Model type -> why it can't be compiled, as the end of a sentence."""


def is_silu_gated(experts: Any) -> bool:
    """Return whether an experts module of transformers computes down(silu(gate) * up), no more."""
    return (
        experts.has_gate
        and type(experts)._apply_gate is _default_apply_gate
        and not experts.has_post_expert_norm
        and (
            isinstance(experts.act_fn, torch.nn.SiLU | SiLUActivation)
            or experts.act_fn is torch.nn.functional.silu
        )
    )
