"""Corrections against least squares solved directly, and what they do to a model's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.correction import fitting as correct_module
from alloc_moe.compiler.correction.fitting import fit_corrections
from alloc_moe.compiler.correction.sums import CorrectionSums
from alloc_moe.compiler.correction.trials import CorrectionTrials, Running
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Correction, CorrectionMode, Redistribution
from alloc_moe.compiler.reference.experts import (
    allocated,
    correct,
    library_experts,
    replaced_experts,
)
from alloc_moe.compiler.reference.policies import LayerParameters

Models = Callable[[str], MoeModel]

EXPERTS, CANDIDATES, HIDDEN = 6, 3, 5


@pytest.fixture
def ids(calibration: CalibrationSet) -> torch.Tensor:
    return torch.from_numpy(calibration.ids)


def half(moe: MoeModel, redistribution: Redistribution = "none") -> Running:
    parameters = [LayerParameters(max(layer.experts_per_token // 2, 1)) for layer in moe.layers]
    return Running(parameters, redistribution, "keep")


def loss(
    moe: MoeModel, ids: torch.Tensor, running: Running, corrections: Sequence[Correction | None]
) -> float:
    """Return the next-token loss under a plan, each window a call of its own."""
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            running.parameters,
            redistribution=running.redistribution,
            weights=running.weights,
            corrections=corrections,
        ),
    ):
        logits = torch.cat([moe.model(input_ids=window).logits for window in ids.split(1)])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("mode", ["gain", "affine"])
@pytest.mark.parametrize("redistribution", ["none", "sequence"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2", "mixtral"])
def test_corrections_never_raise_the_loss_on_the_calibration_text(
    moe_model: Models,
    ids: torch.Tensor,
    family: str,
    redistribution: Redistribution,
    mode: CorrectionMode,
) -> None:
    moe = moe_model(family)
    running = half(moe, redistribution)
    steps: list[int] = []
    found = fit_corrections(moe, ids, running, mode=mode, advance=steps.append)
    assert steps == [1] * 2 * len(moe.layers)
    none = [None] * len(moe.layers)
    assert found.loss_without == pytest.approx(loss(moe, ids, running, none), rel=1e-5)
    assert found.loss_with == pytest.approx(loss(moe, ids, running, found.layers), rel=1e-5)
    assert found.loss_with <= found.loss_without
    assert found.tokens == ids.numel()
    for correction, kind in zip(found.layers, found.kinds, strict=True):
        assert (correction is None) == (kind == "none")
        assert (correction is not None and correction.bias is not None) == (kind == "affine")
        assert kind in (mode, "none")


def states_after(
    moe: MoeModel,
    ids: torch.Tensor,
    layer: int,
    running: Running,
    corrections: Sequence[Correction | None],
) -> torch.Tensor:
    """Return the hidden states that leave a MoE layer's decoder layer."""
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            running.parameters,
            redistribution=running.redistribution,
            weights=running.weights,
            corrections=corrections,
        ),
    ):
        states = moe.model(input_ids=ids, output_hidden_states=True).hidden_states
    found: torch.Tensor = states[moe.layers[layer].decoder_layer + 1]
    return found


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_a_fitted_layer_is_closer_to_the_full_model(
    moe_model: Models, ids: torch.Tensor, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model(family)
    # All are kept whatever the loss: they are fitted to the states, each after those before it.
    monkeypatch.setattr(CorrectionTrials, "losses", lambda *_, **__: torch.zeros(2))
    running = half(moe)
    full = Running([LayerParameters(la.experts_per_token) for la in moe.layers], "none", "keep")
    none = [None] * len(moe.layers)
    errors: dict[str, list[float]] = {}
    for mode in ("affine", "gain"):
        fitted = fit_corrections(moe, ids, running, mode=mode).layers  # type: ignore[arg-type]
        # The last layer's states are normed by some models, which changes their error's measure.
        for layer in range(len(moe.layers) - 1):
            expected = states_after(moe, ids, layer, full, none)
            before = [*fitted[:layer], *none[layer:]]
            scale = expected.square().mean(-1, keepdim=True)
            for name, corrections in ((mode, fitted), (f"{mode} before", before)):
                actual = states_after(moe, ids, layer, running, corrections)
                error = ((actual - expected).square() / scale).mean().item()
                errors.setdefault(name, []).append(error)
    for mode in ("affine", "gain"):
        for after, before in zip(errors[mode], errors[f"{mode} before"], strict=True):
            assert after < before
    # What more is fitted fits better, where both start from the same states.
    assert errors["affine"][0] < errors["gain"][0]


HARMFUL = Correction(np.full(64, -20, np.float32), np.full((8, 64), 3, np.float32))


def test_a_correction_that_does_harm_is_dropped_and_the_others_kept(
    moe_model: Models, own_text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    affine = CorrectionSums.affine
    harmful = iter([False, False, True])
    monkeypatch.setattr(
        CorrectionSums, "affine", lambda sums: HARMFUL if next(harmful) else affine(sums)
    )
    found = fit_corrections(moe, own_text, half(moe), mode="affine")
    assert found.kinds == ("affine", "affine", "none")
    assert found.loss_with <= found.loss_without
    assert found.loss_with == pytest.approx(loss(moe, own_text, half(moe), found.layers), rel=1e-5)


def test_noise_never_raises_the_loss(
    moe_model: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, random = moe_model("olmoe"), torch.Generator().manual_seed(0)
    add = CorrectionSums.add

    def misled(sums: CorrectionSums, outputs: torch.Tensor, *more: torch.Tensor) -> None:
        routed, weights, missing, importance = more
        noise = 3 * outputs.std() * torch.randn(missing.shape, generator=random)
        add(sums, outputs, routed, weights, noise, importance)

    monkeypatch.setattr(CorrectionSums, "add", misled)
    found = fit_corrections(moe, ids, half(moe), mode="affine")
    assert found.loss_with <= found.loss_without
    assert found.loss_with == pytest.approx(loss(moe, ids, half(moe), found.layers), rel=1e-5)


def test_corrections_that_do_harm_together_are_all_dropped(
    moe_model: Models, own_text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    monkeypatch.setattr(CorrectionSums, "gain", lambda _: HARMFUL)
    monkeypatch.setattr(correct_module, "_is_more", lambda *_: False)  # none alone is to blame
    found = fit_corrections(moe, own_text, half(moe), mode="gain")
    assert found.kinds == ("none",) * 3
    assert found.layers == (None,) * 3
    assert found.loss_with == found.loss_without


def test_two_tokens_are_enough(moe_model: Models, ids: torch.Tensor) -> None:
    moe = moe_model("olmoe")
    found = fit_corrections(moe, ids[:1, :2], half(moe), mode="affine")
    assert found.loss_with <= found.loss_without
    assert found.tokens == 2


def test_the_full_plan_needs_no_correction(moe_model: Models, ids: torch.Tensor) -> None:
    moe = moe_model("olmoe")
    running = Running([LayerParameters(la.experts_per_token) for la in moe.layers], "none", "keep")
    found = fit_corrections(moe, ids, running, mode="affine")
    assert found.loss_with == pytest.approx(found.loss_without, rel=1e-6)
    for correction in found.layers:
        if correction is not None:
            np.testing.assert_allclose(correction.scale, 1, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2"])
def test_a_correction_is_what_changed_experts_compute(
    moe_model: Models, family: str, biased: bool
) -> None:
    """Scale the down projection's rows, add the bias to each expert's output."""
    moe, random = moe_model(family), np.random.default_rng(5)
    layer = moe.layers[0]
    hidden = moe.config.hidden_size
    correction = Correction(
        random.standard_normal(hidden, np.float32),
        random.standard_normal((layer.num_experts, hidden), np.float32) if biased else None,
    )
    experts = moe.model.get_submodule(layer.experts_name)
    states = torch.randn(20, hidden, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([torch.arange(20) % 8, (torch.arange(20) + 3) % 8], dim=1)
    weights = torch.rand(20, 2, generator=torch.Generator().manual_seed(2))
    weights[::3, 1] = 0
    changed = copy.deepcopy(experts)
    with torch.inference_mode(), replaced_experts(moe.model, {}):
        changed.down_proj.mul_(torch.from_numpy(correction.scale)[:, None])
        expected = library_experts(changed, states, ids, weights)
        if correction.bias is not None:
            bias = torch.from_numpy(correction.bias)
            expected = expected + (bias[ids] * weights[:, :, None]).sum(1)
        outputs = library_experts(experts, states, ids, weights)
        actual = correct(correction, outputs, ids, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
