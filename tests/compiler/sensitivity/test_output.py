from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Redistribution
from alloc_moe.compiler.reference.experts import replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import output as sensitivity_output
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity

Models = Callable[[str], MoeModel]

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(0).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=3,
    tokens=120,
    sequence_length=24,
    name="random",
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 5 windows take 3 batches, and a batch's logits several."""
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)
    monkeypatch.setattr(sensitivity_output, "_LOGITS_PER_BATCH", 20 * 288)


def candidates(moe: MoeModel) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return weights, ids and outputs of all candidates [tokens, candidates, ...] per layer."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def watch(
        layer: int,
        experts: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        ranked, ranked_ids = rank_candidates(weights, ids)
        rows = hidden.repeat_interleave(ids.shape[1], 0)
        ones = torch.ones(len(rows))
        pairs = run_pairs(experts, rows, ranked_ids.flatten(), ones).view(*ids.shape, -1)
        found[layer] = ranked, ranked_ids, pairs
        return (pairs * ranked[..., None]).sum(1)

    calls = {
        layer.experts_name: functools.partial(watch, index)
        for index, layer in enumerate(moe.layers)
    }
    with torch.inference_mode(), replaced_experts(moe.model, calls):
        moe.model(input_ids=torch.from_numpy(CALIBRATION.ids))
    return [found[index] for index in range(len(moe.layers))]


@pytest.mark.parametrize("redistribution", ["none", "sequence"])
def test_costs_are_relative_squared_errors(
    moe_model: Models, family: str, redistribution: Redistribution
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric="output", redistribution=redistribution)
    real = torch.ones(CALIBRATION.ids.shape, dtype=torch.bool)
    for row, (weights, ids, outputs) in zip(profile.costs, candidates(moe), strict=True):
        weighted = outputs * weights[..., None]
        whole = weighted.sum(1)
        expected = []
        for k in range(1, weights.shape[1] + 1):
            kept = keep_mask(redistribution, weights, ids, real, LayerParameters(k))
            changed = (weighted * kept[..., None]).sum(1)
            expected.append(((changed - whole).square().sum() / whole.square().sum()).item())
        assert row == pytest.approx(expected, rel=1e-4)
        assert row is not None
        assert row[0] > 0.01
        assert row[-1] == 0


def test_sizes_are_root_mean_square_norms(moe_model: Models, family: str) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric="output")
    for sizes, (_, ids, outputs) in zip(profile.expert_sizes, candidates(moe), strict=True):
        squares = outputs.square().sum(-1)
        expected = [
            squares[ids == expert if expert in ids else ids >= 0].mean().sqrt().item()
            for expert in range(len(sizes or ()))
        ]
        assert sizes == pytest.approx(expected, rel=1e-4)


def test_an_expert_that_no_token_wants_gets_the_mean_of_the_layer() -> None:
    from alloc_moe.compiler.records import MoeLayer
    from alloc_moe.compiler.sensitivity.sums import LayerSums

    sums = LayerSums.of(MoeLayer("l", "l.experts", 0, num_experts=3, experts_per_token=2))
    sums.add_pairs(torch.tensor([[0, 2], [2, 0], [2, 0]]), torch.tensor([[1, 8], [16, 1], [9, 1]]))
    assert sums.sizes() == pytest.approx([1, 6**0.5, 11**0.5])


def test_the_loss_is_that_of_kl(moe_model: Models) -> None:
    moe = moe_model("qwen3_moe")
    kl = measure_sensitivity(moe, CALIBRATION, metric="kl")
    for metric in ("output", "fisher"):
        profile = measure_sensitivity(moe, CALIBRATION, metric=metric)  # type: ignore[arg-type]
        assert profile.baseline_loss == pytest.approx(kl.baseline_loss, abs=1e-5)


def test_data_free_costs_are_root_mean_square_changes_for_random_inputs(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    profile = measure_sensitivity(moe, CALIBRATION, metric="data-free")
    found: list[torch.Tensor] = []

    def watch(
        experts: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ranked, ranked_ids = rank_candidates(weights, ids)
        rows = hidden.repeat_interleave(ids.shape[1], 0)
        pairs = run_pairs(experts, rows, ranked_ids.flatten(), ranked.flatten())
        found.append(pairs.view(*ids.shape, -1))
        return hidden

    layer = moe.layers[1]
    random = torch.randn(1, 20000, moe.config.hidden_size, generator=torch.Generator())
    with torch.inference_mode(), replaced_experts(moe.model, {layer.experts_name: watch}):
        moe.model.get_submodule(layer.name)(random)
    expected = [
        found[0][:, k:].sum(1).square().sum(-1).mean().sqrt().item()
        for k in range(1, layer.experts_per_token + 1)
    ]
    assert profile.costs[1] == pytest.approx(expected, rel=0.2)  # of other draws, and fewer
