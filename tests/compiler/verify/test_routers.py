"""Choices of routers are seen in all families, and ties are taken as an artifact took them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.verify.routers import Runs, watched_routers

Models = Callable[[str], MoeModel]
Choices = list[torch.Tensor]

UNSEEN = ("phimoe",)  # takes the largest twice
GROUPED = ("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "nemotron_h")  # groups first


@pytest.fixture
def model_of(checkpoint: Callable[..., Path], moe_model: Models) -> Models:
    """Return a function from a family to a model whose routers may choose any expert."""

    def load(family: str) -> MoeModel:
        if family not in GROUPED:
            return moe_model(family)
        return load_model(str(checkpoint(family, n_group=1, topk_group=1)))

    return load


def choices(
    moe: MoeModel, ids: NDArray[np.int64], *, near: float = 0.0, runs: Runs | None = None
) -> tuple[Choices, float]:
    """Return which experts each layer's router gives [tokens, experts], and the least lead."""
    found: Choices = []

    def watch(layer: int, weights: torch.Tensor, ids: torch.Tensor, _: LayerParameters) -> None:
        mask = torch.zeros(len(ids), moe.layers[layer].num_experts, dtype=torch.bool)
        found.append(mask.scatter_(1, ids, True))

    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            [LayerParameters(layer.experts_per_token) for layer in moe.layers],
            redistribution="none",
            weights="keep",
            watch=watch,
        ) as activations,
        watched_routers(moe.model, moe.layers, activations, near=near, runs=runs),
    ):
        moe.model(input_ids=torch.from_numpy(ids))
    return found, activations.lead


def test_of_experts_that_tie_those_that_ran_are_chosen(
    model_of: Models, compiled_family: str, token_ids: NDArray[np.int64]
) -> None:
    moe, ids = model_of(compiled_family), token_ids[:2, :12]
    own, margin = choices(moe, ids)
    seen = compiled_family not in UNSEEN
    assert np.isfinite(margin) == seen

    torch.manual_seed(0)
    wanted = [mask[:, torch.randperm(mask.shape[1])] for mask in own]
    taken, _ = choices(moe, ids, near=1e30, runs=lambda layer: wanted[layer])
    for layer, mask in enumerate(taken):
        torch.testing.assert_close(mask, wanted[layer] if seen else own[layer])


@pytest.mark.parametrize("family", GROUPED)
def test_of_groups_that_tie_those_of_experts_that_ran_are_chosen(
    moe_model: Models, family: str, token_ids: NDArray[np.int64]
) -> None:
    moe, ids = moe_model(family), token_ids[:2, :12]
    own, _ = choices(moe, ids)
    config, layer = moe.config.get_text_config(), moe.layers[0]
    torch.manual_seed(0)
    wanted = [random_of_groups(mask, config.n_group, config.topk_group) for mask in own]
    taken, _ = choices(moe, ids, near=1e30, runs=lambda layer: wanted[layer])
    assert all(torch.equal(one, other) for one, other in zip(taken, wanted, strict=True))
    assert all((mask.sum(1) == layer.experts_per_token).all() for mask in wanted)


def random_of_groups(own: torch.Tensor, groups: int, chosen: int) -> torch.Tensor:
    """Return as many experts as a router chose of each token [T, E], some of each chosen group."""
    tokens, experts = own.shape
    allowed = torch.rand(tokens, groups).argsort(1) < chosen
    order = torch.rand(tokens, groups, experts // groups)
    order[:, :, 0] += 1
    order = order.masked_fill(~allowed[:, :, None], -1).view(tokens, experts)
    return torch.zeros_like(own).scatter_(1, order.topk(int(own[0].sum())).indices, True)


def test_the_lead_of_a_group_is_told(moe_model: Models, token_ids: NDArray[np.int64]) -> None:
    moe, ids = moe_model("deepseek_v3"), token_ids[:2, :12]
    found: list[float] = []
    topk = torch.topk

    def spy(scores: torch.Tensor, k: int, **given: Any) -> object:
        if scores.ndim == 2 and scores.shape[1] == moe.config.n_group:
            first = scores.sort(1, descending=True).values
            unit = first[:, k - 1].abs().clamp(min=1)
            found.append(((first[:, k - 1] - first[:, k]) / unit).min().item())
        return topk(scores, k, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", spy)
        choices(moe, ids)
    assert choices(moe, ids)[1] == pytest.approx(min(found))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_without_ties_nothing_is_turned(
    moe_model: Models, family: str, token_ids: NDArray[np.int64]
) -> None:
    moe, ids = moe_model(family), token_ids[:2, :12]
    own, margin = choices(moe, ids)
    assert margin > 0
    taken, again = choices(moe, ids, near=0.9 * margin, runs=lambda layer: ~own[layer])
    assert again == margin
    assert all(torch.equal(one, other) for one, other in zip(own, taken, strict=True))
