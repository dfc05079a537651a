"""Gates are told by what they compute, caches by the kinds of layers."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig
from transformers.activations import ACT2FN

from alloc_moe.compiler.model.architectures import Gate, find_gate, why_cache_is_unsupported


class Experts:
    """What an experts module of transformers says of its gate, and an activation of the gate."""

    has_gate = True
    has_post_expert_norm = False
    is_concatenated = True

    def __init__(self, act_fn: Any) -> None:
        self.act_fn = act_fn

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: torch.Tensor = self.act_fn(gate) * up
        return gated


class Clamped(Experts):
    """As gpt-oss; its halves are interleaved."""

    is_concatenated = False

    def __init__(self, alpha: float, beta: float, limit: float) -> None:
        self.gate = Gate(alpha, beta, limit)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.gate.limit), up.clamp(-self.gate.limit, self.gate.limit)
        return (up + self.gate.beta) * gate * torch.sigmoid(gate * self.gate.alpha)


class OneSided(Clamped):
    """Cuts the gate only."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return functional.silu(gate.clamp(max=self.gate.limit)) * up


class OfTheExpert(Experts):
    """Its gate depends on more than gate and up."""

    def _apply_gate(self, gate_up: torch.Tensor, expert: int) -> torch.Tensor:  # type: ignore[override]
        return gate_up


class Without(Experts):
    has_gate = False


class Normed(Experts):
    has_post_expert_norm: ClassVar = True


def silu_in_float32(gate: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate.float()).to(gate.dtype)


@pytest.mark.parametrize(
    "act_fn", [functional.silu, torch.nn.SiLU(), lambda x: x * x.sigmoid(), silu_in_float32]
)
def test_silu_is_silu_whatever_it_is_called(act_fn: Any) -> None:
    assert find_gate(Experts(act_fn)) == Gate(1.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("alpha", "beta", "limit"), [(1.702, 1.0, 7.0), (1.0, 0.0, 10.0), (0.5, -0.25, math.inf)]
)
def test_scales_and_limits_are_found(alpha: float, beta: float, limit: float) -> None:
    assert find_gate(Clamped(alpha, beta, limit)) == Gate(alpha, beta, limit)


@pytest.mark.parametrize("square", [ACT2FN["relu2"], lambda x: functional.relu(x).square()])
def test_a_squared_relu_without_a_gate_is_gated_by_itself(square: Any) -> None:
    found = find_gate(Without(square))
    assert found is not None
    up = torch.linspace(-3, 3, 1001)
    torch.testing.assert_close(found(up, up), functional.relu(up).square(), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize(
    "experts",
    [
        Experts(functional.gelu),
        Experts(functional.relu),
        Experts(torch.tanh),
        OneSided(1.0, 0.0, 7.0),
        OfTheExpert(functional.silu),
        Without(functional.silu),
        Without(functional.relu),
        Without(torch.square),
        Normed(functional.silu),
    ],
    ids=lambda experts: type(experts).__name__,
)
def test_what_the_operator_can_not_compute_is_no_gate(experts: Experts) -> None:
    assert find_gate(experts) is None


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (["linear_attention"], r"none of its layers \(linear_attention\) keeps keys and values"),
        (["linear_attention", "full_attention"], "$"),
    ],
)
def test_some_layer_must_keep_keys_and_values(kinds: list[str], reason: str) -> None:
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=len(kinds), layer_types=kinds)
    assert re.match(reason, why_cache_is_unsupported(config))
