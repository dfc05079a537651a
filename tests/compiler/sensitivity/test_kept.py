"""Sensitivities under a redistribution, against forward passes with it in that layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Metric, Redistribution
from alloc_moe.compiler.reference.experts import Activations, Watch, allocated
from alloc_moe.compiler.reference.policies import LayerParameters
from alloc_moe.compiler.reference.scores import scores
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import replayed as sensitivity_replay
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity

Models = Callable[[str], MoeModel]

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(1).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=0,
    tokens=120,
    sequence_length=24,
    name="random",
)
IDS = torch.from_numpy(CALIBRATION.ids)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 5 windows take 3 batches."""
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)
    monkeypatch.setattr(sensitivity_replay, "_TOKENS_PER_BATCH", 2 * 4 * 24)


def full(moe: MoeModel) -> list[LayerParameters]:
    """All candidates, under any policy."""
    return [LayerParameters(la.experts_per_token, threshold=-math.inf) for la in moe.layers]


def run(
    moe: MoeModel,
    parameters: list[LayerParameters],
    policy: Redistribution,
    watch: Watch | None = None,
) -> tuple[torch.Tensor, Activations]:
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            parameters,
            redistribution=policy,
            weights="keep",
            watch=watch,
        ) as seen,
    ):
        return moe.model(input_ids=IDS).logits.double(), seen


def all_scores(moe: MoeModel, layer: int, policy: Redistribution) -> torch.Tensor:
    """Return the scores of a layer's second and later candidates, in falling order."""
    found: list[torch.Tensor] = []

    def watch(index: int, weights: torch.Tensor, ids: torch.Tensor, _: LayerParameters) -> None:
        if index == layer:
            found.append(scores(policy, weights, ids)[:, 1:])

    run(moe, full(moe), policy, watch)
    return found[0].flatten().sort(descending=True).values


def at(moe: MoeModel, layer: int, k: int, policy: Redistribution) -> LayerParameters:
    if policy == "sequence":
        return LayerParameters(k)
    found = all_scores(moe, layer, policy)
    return LayerParameters(k, threshold=found[(k - 1) * IDS.numel() - 1].item())


def loss(logits: torch.Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("policy", ["sequence", "threshold", "top-p"])
@pytest.mark.parametrize("metric", ["kl", "ppl-suffix"])
def test_costs_are_those_of_the_policy_in_one_layer_alone(
    moe_model: Models, family: str, policy: Redistribution, metric: Metric
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(moe, CALIBRATION, metric=metric, redistribution=policy)
    reference, _ = run(moe, full(moe), policy)
    p = reference.log_softmax(-1)
    for layer, row in enumerate(profile.costs):
        assert row is not None
        for k in range(2, moe.layers[layer].experts_per_token):
            parameters = full(moe)
            parameters[layer] = at(moe, layer, k, policy)
            if metric == "ppl-suffix":
                later = [LayerParameters(1, threshold=math.inf)] * (len(moe.layers) - layer - 1)
                parameters[layer + 1 :] = later
            logits, seen = run(moe, parameters, policy)
            assert seen.per_token[layer] == k
            if metric == "ppl-suffix":
                assert row[k - 1] == pytest.approx(math.exp(loss(logits)), rel=2e-5)
            else:
                divergence = (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean().item()
                assert row[k - 1] == pytest.approx(divergence, rel=1e-4, abs=2e-7)


def test_one_expert_and_all_cost_the_same_under_every_policy(moe_model: Models) -> None:
    moe = moe_model("olmoe")
    policies: tuple[Redistribution, ...] = ("none", "sequence", "threshold", "ratio")
    for metric in ("kl", "fisher", "output"):
        rows = [
            measure_sensitivity(moe, CALIBRATION, metric=metric, redistribution=policy).costs[1]  # type: ignore[arg-type]
            for policy in policies
        ]
        assert all(row is not None and row[-1] == 0 for row in rows)
        firsts = [row[0] for row in rows if row is not None]
        assert firsts == pytest.approx([firsts[0]] * len(policies), rel=1e-5)


def test_batch_is_measured_as_sequence_and_price_as_none(moe_model: Models) -> None:
    moe = moe_model("mixtral")
    found = {
        policy: measure_sensitivity(
            moe, CALIBRATION, metric="fisher", redistribution=policy
        ).redistribution
        for policy in ("none", "batch", "sequence", "threshold", "price")
    }
    assert found == {
        "none": "none",
        "batch": "sequence",
        "sequence": "sequence",
        "threshold": "threshold",
        "price": "none",
    }
