"""What the rounding of experts goes by, against sums written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alloc_moe.compiler.model.architectures import first_projection
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.reference.experts import run_pairs
from alloc_moe.compiler.rounding.expert_sums import ExpertSums

TOKENS, EXPERTS = 6, 3


@pytest.fixture
def shares() -> torch.Tensor:
    """Return shares [tokens, experts]; the last expert is sent nothing."""
    return torch.tensor([[0.3, 0, 0], [0, 0.5, 0], [0.2, 0.1, 0]] * 2)


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what experts are given, and were given before anything was rounded."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, 64, generator=random), torch.randn(TOKENS, 64, generator=random)


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_an_experts_tokens_count_by_their_shares_and_all_tokens_a_little(
    shares: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor], expert: int
) -> None:
    hidden, floats = states
    found = ExpertSums(hidden, floats, shares).gate_up(expert)
    counts = shares[:, expert] + 0.5 * shares.mean(1)
    hessian = sum(c * torch.outer(x, x) for c, x in zip(counts, hidden, strict=True))
    torch.testing.assert_close(found, hessian)


def test_first_projections_give_again_what_they_gave_before_their_inputs_drifted(
    shares: torch.Tensor,
) -> None:
    random = torch.Generator().manual_seed(0)
    floats, weights = torch.randn(200, 64, generator=random), torch.randn(5, 64, generator=random)
    hidden = floats * torch.linspace(0.7, 1.3, 64)
    restored = weights @ ExpertSums(hidden, floats, shares.repeat(34, 1)[:200]).restoring
    wanted = floats @ weights.mT
    before = (hidden @ weights.mT - wanted).square().sum()
    assert (hidden @ restored.mT - wanted).square().sum() < 0.2 * before


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_a_down_projection_goes_by_what_the_experts_gate_gives(
    moe_model: Callable[[str], MoeModel],
    shares: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    family: str,
) -> None:
    moe = moe_model(family)
    module: Any = moe.model.get_submodule(moe.layers[0].experts_name)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    hidden, floats = (each[:, :width] for each in states)
    every = torch.zeros(TOKENS, module.num_experts)
    every[:, :EXPERTS] = shares
    with torch.no_grad():
        first = getattr(module, first_projection(module))
        found = ExpertSums(hidden, floats, every)
        sums, alone = found.down(module, 0, first[0] * 0), found.down_hessian(module, 0)
        down = module.down_proj[0] if module.is_transposed else module.down_proj[0].mT
        bias = module.down_proj_bias[0] if module.has_bias else 0
        given = run_pairs(module, hidden, torch.zeros(TOKENS, dtype=torch.long), torch.ones(TOKENS))
        counts = every[:, 0] + 0.5 * every.mean(1).mean()
        products = given - bias
    # The rows of `down` are known, so that products tell the sums over what they are products of.
    expected = products.mT @ (products * counts[:, None])
    torch.testing.assert_close(down.mT @ sums.hessian @ down, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alone, sums.hessian)
