"""Grouped products against the library's experts, in every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alloc_moe.compiler.correction.folding import ADDED_BIAS
from alloc_moe.compiler.model.architectures import find_gate
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.programs.experts import run_grouped
from alloc_moe.compiler.reference.experts import run_kept

TOKENS = 23


def drawn(moe: MoeModel, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return hidden states, ids, weights and a keep mask for the first MoE layer."""
    random = torch.Generator().manual_seed(seed)
    layer = moe.layers[0]
    hidden = torch.randn(TOKENS, moe.config.get_text_config().hidden_size, generator=random)
    scores = torch.rand(TOKENS, layer.num_experts, generator=random)
    weights, ids = scores.topk(layer.experts_per_token)
    keep = torch.rand(ids.shape, generator=random) < 0.5
    return hidden, ids, weights, keep


@pytest.mark.parametrize("kept", ["some", "all", "none"])
def test_kept_experts_give_what_the_librarys_do(
    moe_model: Callable[[str], MoeModel], family: str, kept: str
) -> None:
    moe = moe_model(family)
    experts = moe.model.get_submodule(moe.layers[0].experts_name)
    hidden, ids, weights, keep = drawn(moe)
    keep = {"some": keep, "all": torch.ones_like(keep), "none": torch.zeros_like(keep)}[kept]
    weights = weights.masked_fill(~keep, 0)
    gate = find_gate(experts)
    assert gate is not None
    with torch.inference_mode():
        found = run_grouped(experts, gate, hidden, ids, weights, keep)
        expected = run_kept(experts, hidden, ids, weights, keep)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_dropped_expert_is_not_computed(moe_model: Callable[[str], MoeModel]) -> None:
    moe = moe_model("olmoe")
    experts = moe.model.get_submodule(moe.layers[0].experts_name)
    hidden, ids, weights, keep = drawn(moe)
    keep = keep & (ids != 3)
    gate = find_gate(experts)
    assert gate is not None
    before = experts.down_proj.data.clone()
    try:
        with torch.inference_mode():
            experts.down_proj.data[3] = float("nan")
            found = run_grouped(experts, gate, hidden, ids, weights.masked_fill(~keep, 0), keep)
    finally:
        experts.down_proj.data = before
    assert found.isfinite().all()


def test_a_correction_adds_a_bias_to_experts_without(
    moe_model: Callable[[str], MoeModel],
) -> None:
    moe = moe_model("olmoe")
    experts = moe.model.get_submodule(moe.layers[0].experts_name)
    hidden, ids, weights, keep = drawn(moe)
    bias = torch.arange(moe.layers[0].num_experts * hidden.shape[1], dtype=torch.float32)
    bias = bias.reshape(-1, hidden.shape[1]) / 100
    kept = weights.masked_fill(~keep, 0)
    gate = find_gate(experts)
    assert gate is not None
    with torch.inference_mode():
        plain = run_grouped(experts, gate, hidden, ids, kept, keep)
        setattr(experts, ADDED_BIAS, bias)
        try:
            found = run_grouped(experts, gate, hidden, ids, kept, keep)
        finally:
            delattr(experts, ADDED_BIAS)
    expected = plain + (kept[..., None] * bias[ids]).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
