"""Sensitivities of experts whose weights are rounded to 4 and 8 bits."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import Metric, SensitivityProfile
from alloc_moe.compiler.reference.experts import replaced_experts, run_pairs
from alloc_moe.compiler.reference.policies import LayerParameters, keep_mask, rank_candidates
from alloc_moe.compiler.rounding.calibrated import calibrated
from alloc_moe.compiler.rounding.formats import choose_formats, mixed_formats
from alloc_moe.compiler.rounding.weights import quantized, with_expert_formats
from alloc_moe.compiler.sensitivity import job
from alloc_moe.compiler.sensitivity import measuring as sensitivity
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.workspace.states import LayerProgress, LayerStates
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

CALIBRATION = CalibrationSet(
    ids=np.random.default_rng(0).integers(0, 256, (5, 24)),
    sha256="0123456789abcdef",
    seed=3,
    tokens=120,
    sequence_length=24,
    name="random",
)


class Mixed(NamedTuple):
    moe: MoeModel
    formats: Sequence[Sequence[BlockFormat]]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 5 windows take 3 batches."""
    monkeypatch.setattr(job, "_TOKENS_PER_BATCH", 2 * 24)


@pytest.fixture(scope="module")
def mixed(checkpoint: Callable[[str], Path]) -> Callable[[str], Mixed]:
    """Return a function from a family to its model, all but experts rounded to 4 bits."""

    @functools.cache
    def load(family: str) -> Mixed:
        moe = load_model(str(checkpoint(family)))
        chosen = choose_formats(moe.checkpoint, "int4")
        return Mixed(quantized(moe, chosen, round_experts=False), mixed_formats(chosen))

    return load


def rounded_copy(experts: torch.nn.Module, form: BlockFormat) -> torch.nn.Module:
    """Return an experts module whose weights are what an artifact computes with."""
    rounded = copy.deepcopy(experts)
    with torch.no_grad():
        for leaf in ("gate_up_proj", "down_proj"):
            weights = rounded.get_parameter(leaf)
            values = dequantize(*quantize(weights.detach().numpy(), form), form)
            weights.copy_(torch.from_numpy(values))
    return rounded


def nearest_copies(mixed: Mixed) -> list[list[torch.nn.Module]]:
    """Return each layer's experts in each width, rounded to the nearest."""
    return [
        [rounded_copy(mixed.moe.model.get_submodule(layer.experts_name), form) for form in forms]
        for layer, forms in zip(mixed.moe.layers, mixed.formats, strict=True)
    ]


def expected_costs(
    mixed: Mixed, copies: list[list[torch.nn.Module]], metric: Metric, redistribution: str
) -> list[list[float]]:
    """Return the costs of every layer's copies, from a plain backward pass per window."""
    moe = mixed.moe
    top: list[list[float]] = [[] for _ in moe.layers]
    whole = [0.0] * len(moe.layers)
    for window, ids in enumerate(torch.from_numpy(CALIBRATION.ids)):
        found: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

        def watch(
            layer: int,
            found: dict[int, tuple[torch.Tensor, list[torch.Tensor]]],
            experts: torch.nn.Module,
            hidden: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
        ) -> torch.Tensor:
            ranked, ranked_ids = rank_candidates(weights, ids)
            rows = hidden.repeat_interleave(ids.shape[1], 0)
            given = (rows, ranked_ids.flatten(), ranked.flatten())
            output = run_pairs(experts, *given).view(*ids.shape, -1).sum(1)
            output.retain_grad()
            real = torch.ones(1, len(ids), dtype=torch.bool)
            changes = []
            for rounded in copies[layer]:
                pairs = run_pairs(rounded, *given).view(*ids.shape, -1)
                for k in range(1, ids.shape[1] + 1):
                    kept = keep_mask(redistribution, ranked, ranked_ids, real, LayerParameters(k))
                    changes.append(((pairs * kept[..., None]).sum(1) - output).detach())
            found[layer] = output, changes
            return output

        calls = {
            layer.experts_name: functools.partial(watch, index, found)
            for index, layer in enumerate(moe.layers)
        }
        with torch.enable_grad(), replaced_experts(moe.model, calls):
            logits = moe.model(input_ids=ids[None]).logits[0]
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)
            uniform = np.random.default_rng([CALIBRATION.seed, window]).random(len(ids))
            labels = (cumulative <= torch.from_numpy(uniform)[:, None]).sum(-1)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        moe.model.zero_grad()
        for layer, (output, changes) in found.items():
            if metric == "fisher":
                squares = [(output.grad * change).sum(-1).square().sum() for change in changes]
                whole[layer] += 2 * len(ids)
            else:
                squares = [change.square().sum() for change in changes]
                whole[layer] += output.square().sum().item()
            before = top[layer] or [0.0] * len(squares)
            top[layer] = [a + b.item() for a, b in zip(before, squares, strict=True)]
    return [[cost / total for cost in row] for row, total in zip(top, whole, strict=True)]


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("metric", ["fisher", "output"])
@pytest.mark.parametrize("redistribution", ["none", "sequence"])
def test_costs_are_those_of_k_rounded_experts_against_all_in_floats(
    mixed: Callable[[str], Mixed], family: str, metric: Metric, redistribution: str
) -> None:
    given = mixed(family)
    profile = measure_sensitivity(
        given.moe,
        CALIBRATION,
        metric=metric,
        redistribution=redistribution,  # type: ignore[arg-type]
        formats=given.formats,
    )
    assert profile.bits == (4, 8)
    every = expected_costs(given, nearest_copies(given), metric, redistribution)
    for row, expected in zip(profile.costs, every, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
        assert row is not None
        # Of all experts the 4 bits cost something, the 8 bits next to nothing.
        four, eight = row[len(row) // 2 - 1], row[-1]
        assert 0 < eight < four / 50


def test_costs_are_those_of_the_values_that_were_chosen_on_the_text(
    checkpoint: Callable[[str], Path],
) -> None:
    def load() -> Mixed:
        moe = load_model(str(checkpoint("olmoe")))
        chosen = choose_formats(moe.checkpoint, "int4")
        formats = mixed_formats(chosen)
        return Mixed(calibrated(moe, chosen, CALIBRATION, widths=formats), formats)

    given = load()
    by_width = []
    for width in zip(*given.formats, strict=True):
        moe = with_expert_formats(load().moe, width)
        by_width.append([moe.model.get_submodule(layer.experts_name) for layer in moe.layers])
    copies = [list(widths) for widths in zip(*by_width, strict=True)]
    profile = measure_sensitivity(
        given.moe, CALIBRATION, metric="fisher", redistribution="none", formats=given.formats
    )
    every = expected_costs(given, copies, "fisher", "none")
    nearest = expected_costs(given, nearest_copies(given), "fisher", "none")
    for row, expected, otherwise in zip(profile.costs, every, nearest, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
        assert row != pytest.approx(otherwise, rel=1e-2)


@pytest.mark.parametrize("metric", ["fisher", "output"])
@pytest.mark.parametrize("correction", ["none", "gain", "affine"])
def test_eight_bits_cost_less_than_four(
    mixed: Callable[[str], Mixed], metric: Metric, correction: str
) -> None:
    given = mixed("olmoe")
    profile = measure_sensitivity(
        given.moe,
        CALIBRATION,
        metric=metric,
        redistribution="threshold",
        correction=correction,  # type: ignore[arg-type]
        formats=given.formats,
    )
    four, eight = np.split(np.array(profile.costs).sum(0), 2)
    assert (eight < four).all()


def test_a_correction_lowers_the_error_of_fewer_rounded_experts(
    mixed: Callable[[str], Mixed],
) -> None:
    given = mixed("olmoe")
    measure = functools.partial(
        measure_sensitivity, given.moe, CALIBRATION, metric="output", formats=given.formats
    )
    plain, corrected = (np.array(measure(correction=mode).costs) for mode in ("none", "affine"))
    assert (corrected[:, [0, 1, 4, 5]].sum(0) < plain[:, [0, 1, 4, 5]].sum(0)).all()
    assert (corrected[:, [3, 7]] == plain[:, [3, 7]]).all()  # none is fitted for all experts


@pytest.mark.parametrize("metric", ["fisher", "output"])
def test_the_weights_are_floats_again_afterwards(
    mixed: Callable[[str], Mixed], metric: Metric
) -> None:
    given = mixed("deepseek_v2")
    before = {name: (p, p.clone()) for name, p in given.moe.model.named_parameters()}
    measure_sensitivity(
        given.moe, CALIBRATION, metric=metric, correction="affine", formats=given.formats
    )
    for name, parameter in given.moe.model.named_parameters():
        same, value = before[name]
        assert parameter is same
        assert torch.equal(parameter, value)
        assert parameter.grad is None


@pytest.fixture(scope="module")
def offloaded(checkpoint: Callable[[str], Path]) -> Callable[[str], Mixed]:
    """Return a function from a family to what `mixed` gives, its layers being read to run."""

    @functools.cache
    def load(family: str) -> Mixed:
        moe = load_model(str(checkpoint(family)), offload="always")
        chosen = choose_formats(moe.checkpoint, "int4")
        return Mixed(quantized(moe, chosen, round_experts=False), mixed_formats(chosen))

    return load


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("metric", ["fisher", "output"])
@pytest.mark.parametrize(
    ("redistribution", "correction"), [("none", "none"), ("threshold", "affine")]
)
def test_layers_that_are_read_to_run_give_the_same(
    mixed: Callable[[str], Mixed],
    offloaded: Callable[[str], Mixed],
    family: str,
    metric: Metric,
    redistribution: str,
    correction: str,
) -> None:
    expected, actual = (
        measure_sensitivity(
            given.moe,
            CALIBRATION,
            metric=metric,
            redistribution=redistribution,  # type: ignore[arg-type]
            correction=correction,  # type: ignore[arg-type]
            formats=given.formats,
        )
        for given in (mixed(family), offloaded(family))
    )
    assert actual.bits == (4, 8)
    assert dataclasses.replace(actual, seconds=0) == dataclasses.replace(expected, seconds=0)


@pytest.mark.parametrize("metric", ["fisher", "output"])
def test_layers_that_are_read_to_run_go_on_after_an_interruption(
    offloaded: Callable[[str], Mixed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: Metric,
) -> None:
    given = offloaded("olmoe")
    measure = functools.partial(
        measure_sensitivity, given.moe, CALIBRATION, metric=metric, formats=given.formats
    )
    whole = measure()
    path = tmp_path / "p.json"
    commit = LayerStates.commit
    passed: list[tuple[str, int]] = []

    def stop_in_the_middle(self: LayerStates, progress: LayerProgress) -> None:
        commit(self, progress)
        passed.append((progress.stage, progress.layer))
        if len(passed) == {"fisher": 5, "output": 2}[metric]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LayerStates, "commit", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            measure(path=path)
    assert passed[-1] == {"fisher": ("backward", 2), "output": ("forward", 2)}[metric]
    resumed = measure(path=path)
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(whole, seconds=0)


@pytest.mark.parametrize("metric", ["fisher", "output"])
def test_an_interrupted_profile_is_resumed(
    mixed: Callable[[str], Mixed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    given = mixed("olmoe")
    measure = functools.partial(
        measure_sensitivity, given.moe, CALIBRATION, metric=metric, formats=given.formats
    )
    whole = measure()
    monkeypatch.setattr(sensitivity, "_SECONDS_PER_SAVE", 0.0)
    path = tmp_path / "p.json"
    saved: list[SensitivityProfile] = []
    save = job.Job.save

    def stop_after_two(self: job.Job, profile: SensitivityProfile) -> None:
        save(self, profile)
        saved.append(profile)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            measure(path=path)
    partial = SensitivityProfile.from_json(path.read_text(), path=path).partial
    assert partial is not None
    assert partial.windows == 4
    resumed = measure(path=path)
    assert (resumed.costs, resumed.expert_sizes) == (whole.costs, whole.expert_sizes)
    assert SensitivityProfile.from_json(path.read_text(), path=path) == resumed
