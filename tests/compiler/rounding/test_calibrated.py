"""Models whose weights are rounded on a text, in memory and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model.layer_progress import forward_gflop
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.rounding import calibrated as module
from alloc_moe.compiler.rounding import gptq
from alloc_moe.compiler.rounding.calibrated import calibrated
from alloc_moe.compiler.rounding.formats import choose_formats, formats_of_bits, mixed_formats
from alloc_moe.compiler.rounding.inputs import LayerInputs
from alloc_moe.compiler.rounding.weights import (
    float_weights,
    pack,
    quantized,
    rounded_experts,
    stored_formats,
    weight_reader,
    with_expert_formats,
)
from alloc_moe.compiler.workspace.results import SavedResults
from alloc_moe.runtime.console import Console


@pytest.fixture
def fresh(checkpoint: Callable[[str], Path]) -> Callable[..., MoeModel]:
    """Return a function that loads a family's model, whose weights may be changed."""

    def load(family: str = "olmoe", offload: str = "never", **changes: object) -> MoeModel:
        moe = load_model(str(checkpoint(family)), offload=offload)  # type: ignore[arg-type]
        return dataclasses.replace(moe, **changes)

    return load


def rounded(moe: MoeModel, calibration: CalibrationSet) -> MoeModel:
    return calibrated(moe, choose_formats(moe.checkpoint, "int4"), calibration)


def weights_of(moe: MoeModel) -> dict[str, torch.Tensor]:
    """Return the stored weights as an artifact's writer reads them, by name."""
    read = weight_reader(moe)
    return {name: read(name, torch.float32) for name in stored_formats(moe)}


def test_each_weight_is_one_that_the_artifact_can_store(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet, family: str
) -> None:
    moe = fresh(family)
    before = {name: value.clone() for name, value in moe.model.named_parameters()}
    moe = rounded(moe, calibration)
    formats = stored_formats(moe)
    parameters = dict(moe.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], parameters[name])}
    assert changed == set(formats) & set(before)
    read = weight_reader(moe)
    for name in changed:
        values = pack(parameters[name].detach(), *formats[name])
        written = pack(read(name, torch.float32), *formats[name])
        assert all(map(torch.equal, values, written)), name


@pytest.mark.parametrize("widest", [512, 16])
def test_a_text_is_said_as_before_more_than_with_the_nearest_values(
    fresh: Callable[..., MoeModel],
    own_text: torch.Tensor,
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    widest: int,
) -> None:
    monkeypatch.setattr(gptq, "THOROUGH", widest)
    monkeypatch.setattr(gptq, "DESCENDED", widest)
    text = dataclasses.replace(calibration, ids=own_text.numpy())

    def said(moe: MoeModel) -> torch.Tensor:
        with torch.no_grad():
            return moe.model(input_ids=own_text).logits.log_softmax(-1)

    def divergence(moe: MoeModel) -> float:
        found = torch.nn.functional.kl_div(said(moe), full, log_target=True, reduction="sum")
        return found.item()

    full = said(fresh())
    moe = fresh()
    nearest = divergence(quantized(moe, choose_formats(moe.checkpoint, "int4")))
    assert divergence(rounded(fresh(), text)) < 0.6 * nearest


def test_floats_are_given_back_and_the_same_values_taken_up_again(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet
) -> None:
    floats = {name: value.clone() for name, value in fresh().model.named_parameters()}
    moe = rounded(fresh(), calibration)
    before = {name: value.clone() for name, value in moe.model.named_parameters()}
    with float_weights(moe):
        for name, value in moe.model.named_parameters():
            assert torch.equal(value, floats[name])
    for name, value in moe.model.named_parameters():
        assert torch.equal(value, before[name])


def test_the_model_says_how_it_was_rounded(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet
) -> None:
    moe = rounded(fresh(), calibration)
    assert moe.quantization is not None
    assert moe.quantization.to_plan()["rounding"] == "gptq"
    assert moe.fingerprint.endswith(f":int4/32/64/gptq:{calibration.sha256}:512:64:0")


def test_further_windows_decide_too(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet
) -> None:
    few = dataclasses.replace(calibration, ids=calibration.ids[:4], tokens=256)
    more = dataclasses.replace(few, further=calibration.ids[4:])
    found = rounded(fresh(), more)
    assert found.fingerprint.endswith(f"gptq:{calibration.sha256}:512:64:0")
    expected = weights_of(rounded(fresh(), calibration))
    for name, values in weights_of(found).items():
        assert torch.equal(values, expected[name]), name


def test_a_model_that_is_slow_to_run_is_rounded_on_the_windows_of_plans(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(calibration, ids=calibration.ids[:4], tokens=256)
    more = dataclasses.replace(few, further=calibration.ids[4:])
    for windows in (6, 0):
        monkeypatch.setattr(module, "_GFLOP", windows * forward_gflop(fresh(), 64) + 1e-9)
        tokens = 64 * max(windows, 4)
        assert rounded(fresh(), more).fingerprint.endswith(f":{tokens}:64:0")


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_layers_on_disk_are_rounded_as_in_memory_and_after_a_kill(
    fresh: Callable[..., MoeModel],
    calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    expected = weights_of(rounded(fresh(name), calibration))
    results = SavedResults(tmp_path / "passes")
    advance = LayerInputs.advance

    def killed(inputs: LayerInputs) -> None:
        if inputs.layer == 1:
            raise KeyboardInterrupt
        advance(inputs)

    monkeypatch.setattr(LayerInputs, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        rounded(fresh(name, "always", results=results), calibration)
    moe = fresh(name, "always", results=results)
    layers: list[int] = []

    def noted(inputs: LayerInputs) -> None:
        layers.append(inputs.layer)
        advance(inputs)

    monkeypatch.setattr(LayerInputs, "advance", noted)
    found = weights_of(rounded(moe, calibration))
    assert layers == list(range(1, moe.config.get_text_config().num_hidden_layers))
    for weight, values in expected.items():
        assert torch.equal(found[weight], values), weight


def test_in_every_width_the_first_experts_are_those_of_that_width_alone(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet
) -> None:
    moe = fresh()
    chosen = choose_formats(moe.checkpoint, "int4")
    formats = mixed_formats(chosen)
    floats = {name: value.clone() for name, value in moe.model.named_parameters()}
    mixed = calibrated(moe, chosen, calibration, widths=formats)
    first = moe.layers[0].experts_name
    for width in zip(*formats, strict=True):
        alone = calibrated(fresh(), dataclasses.replace(chosen, experts=width), calibration)
        with rounded_experts(mixed, first, width[0]):
            for leaf in ("gate_up_proj", "down_proj"):
                expected = alone.model.get_parameter(f"{first}.{leaf}")
                assert torch.equal(mixed.model.get_parameter(f"{first}.{leaf}"), expected)
    experts = [name for name in floats if ".experts." in name]
    assert experts
    for name in experts:
        assert torch.equal(mixed.model.get_parameter(name), floats[name])


def test_widths_are_the_same_with_layers_on_disk(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet, tmp_path: Path
) -> None:
    found = []
    for offload, results in (("never", None), ("always", tmp_path / "passes")):
        moe = fresh("gpt_oss", offload, results=SavedResults(results))
        chosen = choose_formats(moe.checkpoint, "int4")
        formats = mixed_formats(chosen)
        moe = calibrated(moe, chosen, calibration, widths=formats)
        bits = [4 if index % 2 else 8 for index in range(len(moe.layers))]
        found.append(weights_of(with_expert_formats(moe, formats_of_bits(formats, bits))))
    expected, actual = found
    for weight, values in expected.items():
        assert torch.equal(actual[weight], values), weight


def test_broken_weights_are_refused(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet
) -> None:
    moe = fresh()
    with torch.no_grad():
        moe.model.get_parameter("model.layers.0.self_attn.v_proj.weight")[0] = torch.inf
    with pytest.raises(UnsupportedModelError, match=r"What model\.layers\.0\.self_attn\.o_proj"):
        rounded(moe, calibration)


def test_values_that_are_no_numbers_are_refused(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "round_products", lambda weights, *_: torch.full_like(weights, torch.inf)
    )
    with pytest.raises(UnsupportedModelError, match=r"^The values of model\.layers\.0\..* are too"):
        rounded(fresh(), calibration)


@pytest.mark.parametrize("mixed", [False, True])
def test_every_matrix_is_counted(
    fresh: Callable[..., MoeModel],
    calibration: CalibrationSet,
    capsys: pytest.CaptureFixture[str],
    mixed: bool,
) -> None:
    moe = fresh("mixtral")
    chosen = choose_formats(moe.checkpoint, "int4")
    widths = mixed_formats(chosen) if mixed else ()
    calibrated(moe, chosen, calibration, widths=widths, console=Console())
    experts = sum(layer.num_experts for layer in moe.layers)
    matrices = experts * 2 * (1 + mixed) + len(moe.layers) * 4  # 4 projections of attention
    assert f"Rounding weights to int4: {matrices} matrices in " in capsys.readouterr().err


def test_experts_are_rounded_alike_one_at_a_time(
    fresh: Callable[..., MoeModel], calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = weights_of(rounded(fresh(), calibration))
    monkeypatch.setattr(module, "_SUMS", 1)
    apart = weights_of(rounded(fresh(), calibration))
    names = [name for name in together if name.startswith("model.layers.0.mlp.experts")]
    assert len(names) == 2
    for name in names:
        share = (together[name] == apart[name]).float().mean()
        assert share > 0.999  # products of several matrices may differ in their last digits
