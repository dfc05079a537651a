"""Sensitivities with corrections, against corrections fitted and applied one at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.correction.sums import CorrectionSums
from alloc_moe.compiler.errors import ProfileError
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import (
    Correction,
    CorrectionMode,
    Metric,
    Redistribution,
    SensitivityProfile,
)
from alloc_moe.compiler.reference.experts import (
    allocated,
    correct,
    library_experts,
    replaced_experts,
    run_kept,
)
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.sensitivity import corrected as sensitivity_correct
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sensitivity import replayed as sensitivity_replay
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity

Models = Callable[[str], MoeModel]

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(2).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=3,
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


@dataclasses.dataclass
class Layer:
    """One MoE layer of the full model on all windows; the last axis of tensors is the width."""

    experts: torch.nn.Module
    inputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    states: torch.Tensor  # after its decoder layer

    @torch.no_grad()
    def kept(self, policy: Redistribution, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the kept candidates, and their weights with zeros."""
        real = torch.ones(IDS.shape, dtype=torch.bool)
        mask = keep_mask(policy, self.weights, self.ids, real, LayerParameters(k))
        return run_kept(self.experts, self.inputs, self.ids, self.weights, mask), (
            self.weights * mask
        )

    @torch.no_grad()
    def full(self) -> torch.Tensor:
        return library_experts(self.experts, self.inputs, self.ids, self.weights)

    def fit(self, policy: Redistribution, k: int, mode: CorrectionMode) -> Correction:
        outputs, weights = self.kept(policy, k)
        sums = CorrectionSums(self.experts.num_experts if mode == "affine" else 0)
        counts = 1 / self.states.square().mean(1)
        sums.add(outputs, self.ids, weights, self.full() - outputs, counts)
        return sums.affine() if mode == "affine" else sums.gain()

    def corrected(self, policy: Redistribution, k: int, mode: CorrectionMode) -> torch.Tensor:
        outputs, weights = self.kept(policy, k)
        return correct(self.fit(policy, k, mode), outputs, self.ids, weights)


def watch_layer(moe: MoeModel, layer: int) -> Layer:
    given: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    experts = moe.model.get_submodule(moe.layers[layer].experts_name)

    def watch(module: torch.nn.Module, *call: torch.Tensor) -> torch.Tensor:
        given.extend(call)
        return library_experts(module, *call)

    decoder_layer = moe.model.model.layers[moe.layers[layer].decoder_layer]
    handle = decoder_layer.register_forward_hook(
        lambda module, args, output: states.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad(), replaced_experts(moe.model, {moe.layers[layer].experts_name: watch}):
        moe.model(input_ids=IDS)
    handle.remove()
    hidden, ids, weights = given
    ranked, ranked_ids = rank_candidates(weights, ids)
    return Layer(experts, hidden, ranked_ids, ranked, states[0].flatten(0, 1))


def logits(
    moe: MoeModel, ks: list[int], policy: Redistribution, corrections: list[Correction | None]
) -> torch.Tensor:
    with (
        torch.no_grad(),
        allocated(
            moe.model,
            moe.layers,
            [LayerParameters(k) for k in ks],
            redistribution=policy,
            weights="keep",
            corrections=corrections,
        ),
    ):
        # One window per call: each is a pool of its own.
        found = [moe.model(input_ids=ids[None]).logits.double() for ids in IDS]
        return torch.cat(found)


def loss(of: torch.Tensor) -> float:
    return F.cross_entropy(of[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("policy", "mode"), [("none", "affine"), ("sequence", "affine"), ("sequence", "gain")]
)
@pytest.mark.parametrize("metric", ["kl", "ppl-suffix"])
def test_costs_are_those_of_one_corrected_layer(
    moe_model: Models, family: str, policy: Redistribution, mode: CorrectionMode, metric: Metric
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(
        moe, CALIBRATION, metric=metric, redistribution=policy, correction=mode
    )
    full = [layer.experts_per_token for layer in moe.layers]
    none: list[Correction | None] = [None] * len(full)
    p = logits(moe, full, policy, none).log_softmax(-1)
    for layer, row in enumerate(profile.costs):
        assert row is not None
        watched = watch_layer(moe, layer)
        for k in range(1, full[layer]):
            later = [1] * (len(full) - layer - 1) if metric != "kl" else full[layer + 1 :]
            corrections = [*none[:layer], watched.fit(policy, k, mode), *none[layer + 1 :]]
            changed = logits(moe, [*full[:layer], k, *later], policy, corrections)
            if metric == "ppl-suffix":
                assert row[k - 1] == pytest.approx(math.exp(loss(changed)), rel=2e-5)
            else:
                divergence = (p.exp() * (p - changed.log_softmax(-1))).sum(-1).mean().item()
                assert row[k - 1] == pytest.approx(divergence, rel=1e-3, abs=2e-7)
        if metric == "kl":
            assert row[-1] == 0.0


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("policy", "mode"), [("none", "affine"), ("sequence", "affine"), ("sequence", "gain")]
)
def test_output_costs_are_what_the_correction_leaves(
    moe_model: Models, family: str, policy: Redistribution, mode: CorrectionMode
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(
        moe, CALIBRATION, metric="output", redistribution=policy, correction=mode
    )
    for index, layer in enumerate(moe.layers):
        watched = watch_layer(moe, index)
        full = watched.full().double()
        expected = [
            (watched.corrected(policy, k, mode) - full).square().sum().item()
            / full.square().sum().item()
            for k in range(1, layer.experts_per_token)
        ]
        assert profile.costs[index] == pytest.approx([*expected, 0.0], rel=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("policy", "mode"), [("none", "affine"), ("sequence", "affine"), ("sequence", "gain")]
)
def test_fisher_costs_are_the_gradient_along_what_the_correction_leaves(
    moe_model: Models, family: str, policy: Redistribution, mode: CorrectionMode
) -> None:
    moe = moe_model(family)
    profile = measure_sensitivity(
        moe, CALIBRATION, metric="fisher", redistribution=policy, correction=mode
    )
    gradients = sampled_gradients(moe)
    for index, layer in enumerate(moe.layers):
        watched = watch_layer(moe, index)
        expected = []
        for k in range(1, layer.experts_per_token):
            change = watched.corrected(policy, k, mode) - watched.full()
            along = (gradients[index] * change).sum(-1)
            expected.append(along.double().square().mean().item() / 2)
        assert profile.costs[index] == pytest.approx([*expected, 0.0], rel=1e-3)


def sampled_gradients(moe: MoeModel) -> list[torch.Tensor]:
    """Return the gradient at each layer's routed output [T, H], from plain backward passes."""
    windows: list[list[torch.Tensor]] = []
    for window, ids in enumerate(IDS):
        found: list[torch.Tensor] = []

        def keep(
            into: list[torch.Tensor], experts: torch.nn.Module, *call: torch.Tensor
        ) -> torch.Tensor:
            output = library_experts(experts, *call)
            output.retain_grad()
            into.append(output)
            return output

        calls = {layer.experts_name: functools.partial(keep, found) for layer in moe.layers}
        with torch.enable_grad(), replaced_experts(moe.model, calls):
            given = moe.model(input_ids=ids[None]).logits[0]
            cumulative = given.detach().double().softmax(-1).cumsum(-1)
            uniform = np.random.default_rng([CALIBRATION.seed, window]).random(len(ids))
            labels = (cumulative <= torch.from_numpy(uniform)[:, None]).sum(-1)
            F.cross_entropy(given, labels, reduction="sum").backward()
        windows.append([output.grad for output in found])
    moe.model.zero_grad()  # other tests share it
    return [torch.cat(parts) for parts in zip(*windows, strict=True)]


@pytest.mark.parametrize("metric", ["kl", "output", "fisher"])
def test_sizes_and_the_full_models_loss_are_as_without(moe_model: Models, metric: Metric) -> None:
    moe = moe_model("olmoe")
    without = measure_sensitivity(moe, CALIBRATION, metric=metric)
    corrected = measure_sensitivity(moe, CALIBRATION, metric=metric, correction="affine")
    assert corrected.baseline_loss == without.baseline_loss
    for sizes, expected in zip(corrected.expert_sizes, without.expert_sizes, strict=True):
        assert sizes == (expected and pytest.approx(expected, rel=1e-5))
    assert corrected.costs != without.costs


class _StopError(Exception):
    pass


def test_a_resumed_profile_with_corrections_is_identical(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    measure = functools.partial(
        measure_sensitivity, moe, CALIBRATION, redistribution="sequence", correction="affine"
    )
    path = tmp_path / "kl.json"
    with monkeypatch.context() as patch:
        saves = iter(range(2))  # of nothing, and of the first layer

        def stop(self: job.Job, profile: SensitivityProfile) -> None:
            save(self, profile)
            if next(saves, None) == 1:
                raise _StopError

        save = job.Job.save
        patch.setattr(job.Job, "save", stop)
        with pytest.raises(_StopError):
            measure(metric="kl", path=path)
    assert [row is None for row in json.loads(path.read_text())["costs"]] == [False, True, True]
    resumed = measure(metric="kl", path=path)
    assert resumed.correction == "affine"
    assert resumed.costs == measure(metric="kl").costs
    assert SensitivityProfile.from_json(path.read_text(), path=path) == resumed


@pytest.mark.parametrize("metric", ["output", "fisher"])
def test_a_resumed_profile_of_one_pass_with_corrections_is_identical(
    moe_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    monkeypatch.setattr(sensitivity, "_SECONDS_PER_SAVE", 0)
    moe = moe_model("olmoe")
    path = tmp_path / "profile.json"
    with monkeypatch.context() as patch:
        save = job.Job.save

        def stop(self: job.Job, profile: SensitivityProfile) -> None:
            save(self, profile)
            if profile.partial is not None:
                raise _StopError

        patch.setattr(job.Job, "save", stop)
        with pytest.raises(_StopError):
            measure_sensitivity(moe, CALIBRATION, metric=metric, correction="affine", path=path)
    resumed = measure_sensitivity(moe, CALIBRATION, metric=metric, correction="affine", path=path)
    whole = measure_sensitivity(moe, CALIBRATION, metric=metric, correction="affine")
    assert resumed.costs == whole.costs


def test_a_profile_with_another_correction_is_refused(moe_model: Models, tmp_path: Path) -> None:
    moe = moe_model("mixtral")
    path = tmp_path / "profile.json"
    measure_sensitivity(moe, CALIBRATION, metric="output", correction="affine", path=path)
    message = r"the correction \(there affine, now gain\) changed"
    with pytest.raises(ProfileError, match=message):
        measure_sensitivity(moe, CALIBRATION, metric="output", correction="gain", path=path)


def test_a_file_of_an_earlier_version_has_no_correction(moe_model: Models, tmp_path: Path) -> None:
    moe = moe_model("mixtral")
    path = tmp_path / "profile.json"
    profile = measure_sensitivity(moe, CALIBRATION, metric="output", path=path)
    data = json.loads(path.read_text())
    del data["correction"]
    path.write_text(json.dumps(data))
    assert measure_sensitivity(moe, CALIBRATION, metric="output", path=path) == profile
    with pytest.raises(ProfileError, match=r"the correction \(there none, now affine\)"):
        measure_sensitivity(moe, CALIBRATION, metric="output", correction="affine", path=path)


def test_nothing_is_fitted_where_no_cost_counts(
    moe_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_correct, "CorrectionSums", None)
    moe = moe_model("mixtral")
    price = measure_sensitivity(
        moe, CALIBRATION, metric="fisher", redistribution="price", correction="affine"
    )
    free = measure_sensitivity(moe, CALIBRATION, metric="data-free", correction="affine")
    assert (price.correction, free.correction) == ("none", "none")
