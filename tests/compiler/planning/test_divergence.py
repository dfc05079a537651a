"""KL(full model || plan), against its definition on whole logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.planning.divergence import Divergence
from alloc_moe.compiler.planning.thresholds import Setting, common_threshold, layer_thresholds
from alloc_moe.compiler.records import Correction
from alloc_moe.compiler.reference import losses
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters

Models = Callable[[str], MoeModel]


def direct(
    moe: MoeModel,
    calibration: CalibrationSet,
    parameters: Sequence[LayerParameters],
    setting: Setting,
) -> float:
    """Return the mean over tokens of the divergence, window by window, from all logits."""
    values = []
    for window in torch.from_numpy(calibration.ids).split(1):
        with torch.inference_mode():
            full = moe.model(input_ids=window).logits[0].double().log_softmax(-1)
            with allocated(
                moe.model,
                moe.layers,
                parameters,
                redistribution=setting.redistribution,
                weights=setting.weights,
                corrections=setting.corrections,
            ):
                plan = moe.model(input_ids=window).logits[0].double().log_softmax(-1)
        values.append((full.exp() * (full - plan)).sum(-1))
    return float(torch.cat(values).mean())


def ones(moe: MoeModel) -> tuple[tuple[float, ...], ...]:
    return tuple((1.0,) * layer.num_experts for layer in moe.layers)


@pytest.mark.parametrize("redistribution", ["none", "batch", "threshold"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_the_divergence_of_an_allocation_is_that_of_its_logits(
    moe_model: Models, calibration: CalibrationSet, family: str, redistribution: str
) -> None:
    moe, setting = moe_model(family), Setting(redistribution, "renorm")  # type: ignore[arg-type]
    ks = [1 + index % 3 for index, _ in enumerate(moe.layers)]
    parameters = [LayerParameters(k) for k in ks]
    if redistribution == "threshold":
        found = layer_thresholds(moe, torch.from_numpy(calibration.ids), setting, ks)
        parameters = [LayerParameters(4, value) for value in found.values]
    measured = Divergence(moe, calibration).of_allocation(ks, setting)
    assert measured == pytest.approx(direct(moe, calibration, parameters, setting), rel=1e-4)
    assert measured > 1e-4


def test_the_divergence_of_a_price_makes_up_for_activations_left_over(
    moe_model: Models, calibration: CalibrationSet
) -> None:
    moe = moe_model("olmoe")
    setting = Setting("price", sizes=ones(moe))
    found = common_threshold(moe, torch.from_numpy(calibration.ids), setting, 7.0)
    assert setting.sizes is not None
    parameters = [
        LayerParameters(4, price, sizes)
        for price, sizes in zip(found.values, setting.sizes, strict=True)
    ]
    expected = direct(moe, calibration, parameters, setting) * (found.activations / 7) ** 2
    measured = Divergence(moe, calibration).of_price(setting, 7.0)
    assert measured == pytest.approx(expected, rel=1e-4)


def test_corrections_are_part_of_what_diverges(
    moe_model: Models, calibration: CalibrationSet
) -> None:
    moe, random = moe_model("olmoe"), np.random.default_rng(2)
    correction = Correction(
        1 + 0.1 * random.standard_normal(64, np.float32),
        0.1 * random.standard_normal((8, 64), np.float32),
    )
    plain = Setting("none")
    corrected = dataclasses.replace(plain, corrections=(None, correction, None))
    parameters = [LayerParameters(2)] * 3
    divergence = Divergence(moe, calibration)
    measured = divergence.measure(parameters, corrected)
    assert measured == pytest.approx(direct(moe, calibration, parameters, corrected), rel=1e-4)
    assert measured != pytest.approx(divergence.measure(parameters, plain), rel=1e-3)


def test_the_full_model_does_not_diverge(moe_model: Models, calibration: CalibrationSet) -> None:
    moe = moe_model("olmoe")
    assert Divergence(moe, calibration).of_allocation([4, 4, 4], Setting("none")) < 1e-9


def test_logits_are_made_a_few_at_a_time(
    moe_model: Models, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, setting = moe_model("olmoe"), Setting("none")
    whole = Divergence(moe, calibration).of_allocation([2, 2, 2], setting)
    monkeypatch.setattr(losses, "_LOGITS_PER_BATCH", 1)
    parts = Divergence(moe, calibration).of_allocation([2, 2, 2], setting)
    assert parts == pytest.approx(whole, rel=1e-5)
