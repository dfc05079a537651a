from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.reference.experts import replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.sensitivity import fisher as sensitivity_fisher
from alloc_moe.compiler.sensitivity import job
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
    monkeypatch.setattr(sensitivity_fisher, "_LOGITS_PER_BATCH", 20 * 288)


class Watched(NamedTuple):
    """One MoE layer in one window: ``weighted`` are the candidates' weighted outputs, ranked."""

    weights: torch.Tensor  # [tokens, candidates]
    ids: torch.Tensor  # [tokens, candidates]
    weighted: torch.Tensor  # [tokens, candidates, hidden]
    output: torch.Tensor  # [tokens, hidden]; its gradient is kept


def watch(
    found: dict[int, Watched],
    layer: int,
    experts: torch.nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    ranked, ranked_ids = rank_candidates(weights, ids)
    rows = hidden.repeat_interleave(ids.shape[1], 0)
    pairs = run_pairs(experts, rows, ranked_ids.flatten(), ranked.flatten())
    pairs = pairs.view(*ranked.shape, -1)
    output = pairs.sum(1)
    output.retain_grad()
    found[layer] = Watched(ranked, ranked_ids, pairs, output)
    return output


def watched_windows(moe: MoeModel) -> list[dict[int, Watched]]:
    """Return every layer with its gradient, from a plain backward pass per window."""
    windows = []
    for window, ids in enumerate(torch.from_numpy(CALIBRATION.ids)):
        found: dict[int, Watched] = {}
        calls = {
            layer.experts_name: functools.partial(watch, found, index)
            for index, layer in enumerate(moe.layers)
        }
        with torch.enable_grad(), replaced_experts(moe.model, calls):
            logits = moe.model(input_ids=ids[None]).logits[0]
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)
            uniform = np.random.default_rng([CALIBRATION.seed, window]).random(len(ids))
            labels = (cumulative <= torch.from_numpy(uniform)[:, None]).sum(-1)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        windows.append(found)
    moe.model.zero_grad()  # other tests share it
    return windows


@pytest.mark.parametrize("redistribution", ["none", "sequence"])
def test_costs_are_those_of_a_plain_backward_pass(
    moe_model: Models, family: str, redistribution: str
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric="fisher", redistribution=redistribution)
    windows = watched_windows(moe)
    for index, layer in enumerate(moe.layers):
        expected = []
        for k in range(1, layer.experts_per_token + 1):
            changes = []
            for found in windows:
                weights, ids, weighted, output = found[index]
                real = torch.ones(1, len(ids), dtype=torch.bool)
                kept = keep_mask(redistribution, weights, ids, real, LayerParameters(k))
                change = -(weighted * ~kept[..., None]).sum(1)
                changes.append((output.grad * change).sum(-1))
            expected.append(torch.cat(changes).double().square().mean().item() / 2)
        row = profile.costs[index]
        assert row == pytest.approx(expected, rel=1e-4)
        assert row[0] > 1e-4
        assert row[-1] == 0


def test_sizes_are_root_mean_squares_of_the_gradient_along_each_expert(
    moe_model: Models, family: str
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric="fisher")
    windows = watched_windows(moe)
    for index, layer in enumerate(moe.layers):
        squares: list[list[float]] = [[] for _ in range(layer.num_experts)]
        for found in windows:
            weights, ids, weighted, output = found[index]
            along = ((weighted * output.grad[:, None]).sum(-1) / weights).square()
            for expert, square in zip(ids.flatten(), along.flatten(), strict=True):
                squares[expert].append(square.item())
        everything = [square for each in squares for square in each]
        expected = [np.mean(each or everything) ** 0.5 for each in squares]
        assert profile.expert_sizes[index] == pytest.approx(expected, rel=1e-4)


def test_a_cost_is_near_the_divergence_it_stands_for(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    fisher = measure_sensitivity(moe, CALIBRATION, metric="fisher")
    kl = measure_sensitivity(moe, CALIBRATION, metric="kl")
    for row, divergences in zip(fisher.costs, kl.costs, strict=True):
        assert row[:-1] == pytest.approx(divergences[:-1], rel=0.5)


def test_nothing_is_left_behind(moe_model: Models) -> None:
    moe = moe_model("deepseek_v2")
    ids = torch.from_numpy(CALIBRATION.ids)
    flags = [parameter.requires_grad for parameter in moe.model.parameters()]
    with torch.inference_mode():
        before = moe.model(input_ids=ids).logits
        measure_sensitivity(moe, CALIBRATION, metric="fisher")
        assert torch.equal(moe.model(input_ids=ids).logits, before)
    assert [parameter.requires_grad for parameter in moe.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in moe.model.parameters())


def test_labels_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(4000, -1)
    uniform = torch.from_numpy(np.random.default_rng(0).random(4000))
    counts = torch.bincount(sensitivity_fisher._draw(logits, uniform), minlength=4)
    assert (counts / 4000).tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.02)


def test_several_threads_give_the_same_bits_every_time(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2048)
    ids = np.random.default_rng(0).integers(0, 256, (16, 128))
    text = dataclasses.replace(CALIBRATION, ids=ids, tokens=2048, sequence_length=128)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        profiles = [measure_sensitivity(moe, text, metric="fisher") for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert len({(profile.costs, profile.expert_sizes) for profile in profiles}) == 1
