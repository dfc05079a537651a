"""What deviates from the generic MoE layer: the one table of special cases.

A model needs no row here if its experts module follows transformers' fused layout
(`use_experts_implementation`) with a gate that `find_gate` finds, and if it exports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

UNSUPPORTED: dict[str, str] = {
    "llama4": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
    "llama4_text": "its rotary embedding uses complex numbers, which ONNX export doesn't support",
}
"""Model type -> why it can't be compiled, as the end of a sentence."""

_NEAR, _FAR = 0.125, 1e4  # within any limit, and beyond it
_DIGITS = 4  # of alpha and beta; a gate in float32 gives no more
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Gate:
    """How experts combine gate g and up u: ``g * sigmoid(alpha * g) * (u + beta)``.

    Before that g is cut at ``limit``, u at both ends; infinite where nothing is.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return what the experts' down projection gets."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def find_gate(experts: Any) -> Gate | None:
    """Return the gate that an experts module of transformers computes; None if it is another kind.

    Found by what it computes, not by what it is called.
    """
    if not experts.has_gate or experts.has_post_expert_norm:
        return None
    try:
        return _fit_gate(experts)
    except (RuntimeError, TypeError, AttributeError, IndexError):  # it takes other arguments
        return None


def _fit_gate(experts: Any) -> Gate | None:
    at_zero, near, far = _apply(experts, [_NEAR] * 3, [0.0, _NEAR, _FAR]).tolist()
    slope = (near - at_zero) / _NEAR  # in up
    half = slope / _NEAR  # sigmoid(alpha * gate)
    if not 0 < half < 1:
        return None
    beta = round(at_zero / slope, _DIGITS)
    alpha = round(math.log(half / (1 - half)) / _NEAR, _DIGITS)
    most = far / slope - beta
    found = Gate(alpha, beta, math.inf if most > _FAR / 2 else round(most, _DIGITS))
    values = torch.tensor([-_FAR, *torch.linspace(-12, 12, 49).tolist(), _FAR], dtype=torch.float64)
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    expected, actual = found(gate, up), _apply(experts, gate.tolist(), up.tolist())
    agree = torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return found if agree else None


def _apply(experts: Any, gate: list[float], up: list[float]) -> torch.Tensor:
    halves = torch.tensor([gate, up], dtype=torch.float64)
    joined = halves.flatten() if experts.is_concatenated else halves.T.flatten()
    with torch.inference_mode():
        gated: torch.Tensor = experts._apply_gate(joined[None])
    return gated[0].double()
