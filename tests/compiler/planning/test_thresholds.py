"""Thresholds that meet a target in the mean, counted by running the model under them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.model.replay import find_decoder_layers
from alloc_moe.compiler.planning.thresholds import (
    Setting,
    _cut,
    _Falling,
    common_threshold,
    dial_passes,
    dropped_costs,
    layer_thresholds,
    measure_dial,
)
from alloc_moe.compiler.records import SCORED, Redistribution
from alloc_moe.compiler.reference.experts import allocated
from alloc_moe.compiler.reference.policies import LayerParameters

Models = Callable[[str], MoeModel]

COMMON = ["price", "top-p", "ratio"]


@pytest.fixture
def ids(token_ids: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(token_ids)


def setting_of(moe: MoeModel, redistribution: Redistribution) -> Setting:
    if redistribution != "price":
        return Setting(redistribution)
    sizes = (np.linspace(0.5, 2, layer.num_experts) for layer in moe.layers)
    return Setting("price", sizes=tuple(tuple(row.tolist()) for row in sizes))


def executed(
    moe: MoeModel, ids: torch.Tensor, setting: Setting, thresholds: Sequence[float]
) -> tuple[float, ...]:
    """Return the experts per token that the model runs in each layer."""
    parameters = [
        LayerParameters(layer.experts_per_token, threshold, sizes)
        for layer, threshold, sizes in zip(
            moe.layers, thresholds, setting.sizes or (None,) * len(moe.layers), strict=True
        )
    ]
    with (
        torch.inference_mode(),
        allocated(
            moe.model,
            moe.layers,
            parameters,
            redistribution=setting.redistribution,
            weights=setting.weights,
            corrections=setting.corrections,
        ) as activations,
    ):
        moe.model(input_ids=ids)
    return tuple(activations.per_token)


def test_what_is_dropped_costs_half_its_squared_scores(
    moe_model: Models, ids: torch.Tensor
) -> None:
    moe = moe_model("olmoe")
    setting = setting_of(moe, "price")
    costs = dropped_costs(moe, ids, setting)
    most = sum(layer.experts_per_token for layer in moe.layers)
    assert len(costs) == most - len(moe.layers) + 1
    assert setting.sizes is not None
    given: list[tuple[torch.Tensor, ...]] = []
    modules = [moe.model.get_submodule(layer.experts_name) for layer in moe.layers]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
        for module in modules
    ]
    with torch.inference_mode():
        moe.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found = []
    for (_, candidates, weights), sizes in zip(given, setting.sizes, strict=True):
        ranked = weights.sort(1, descending=True)
        size = torch.tensor(sizes)[candidates.gather(1, ranked.indices)]
        found.append((ranked.values * size)[:, 1:].flatten())
    rising = torch.cat(found).double().sort().values.square() / (2 * ids.numel())
    for kept in (0, 1, most - len(moe.layers)):
        dropped = rising[: len(rising) - kept * ids.numel()].sum().item()
        assert costs[kept] == pytest.approx(dropped, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("redistribution", SCORED)
def test_thresholds_per_layer_keep_what_was_asked(
    moe_model: Models, ids: torch.Tensor, family: str, redistribution: Redistribution
) -> None:
    moe = moe_model(family)
    setting = setting_of(moe, redistribution)
    targets = [1 + (0.4 + 0.1 * n) * (la.experts_per_token - 1) for n, la in enumerate(moe.layers)]
    found = layer_thresholds(moe, ids, setting, targets)
    assert found.ks == pytest.approx(executed(moe, ids, setting, found.values), rel=1e-12)
    assert 0.995 * sum(targets) <= found.activations <= sum(targets)
    assert found.ks == pytest.approx(targets, rel=0.01)


@pytest.mark.parametrize("redistribution", COMMON)
def test_one_threshold_for_all_layers_keeps_what_was_asked(
    moe_model: Models, ids: torch.Tensor, family: str, redistribution: Redistribution
) -> None:
    moe = moe_model(family)
    setting = setting_of(moe, redistribution)
    asked = 0.6 * sum(layer.experts_per_token for layer in moe.layers)
    found = common_threshold(moe, ids, setting, asked)
    assert len(set(found.values)) == 1
    assert found.ks == pytest.approx(executed(moe, ids, setting, found.values), rel=1e-12)
    assert 0.995 * asked <= found.activations <= asked


@pytest.mark.parametrize("weights", ["keep", "renorm"])
def test_thresholds_are_set_on_what_the_weights_make_of_later_layers(
    moe_model: Models, ids: torch.Tensor, weights: str
) -> None:
    moe = moe_model("olmoe")
    setting = dataclasses.replace(setting_of(moe, "threshold"), weights=weights)
    found = layer_thresholds(moe, ids, setting, [2.0, 2.5, 3.0])
    assert found.ks == pytest.approx(executed(moe, ids, setting, found.values), rel=1e-12)
    assert 0.995 * 7.5 <= found.activations <= 7.5


@pytest.mark.parametrize("redistribution", SCORED)
def test_k_of_one_and_of_all_are_kept_exactly(
    moe_model: Models, ids: torch.Tensor, redistribution: Redistribution
) -> None:
    moe = moe_model("olmoe")
    setting = setting_of(moe, redistribution)
    for targets in ([1.0, 4.0, 2.0], [3.0, 1.0, 4.0], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0]):
        found = layer_thresholds(moe, ids, setting, targets)
        other = executed(moe, ids.flip(1), setting, found.values)  # on any text, not on this one
        for kept, elsewhere, target in zip(found.ks, other, targets, strict=True):
            if target in (1.0, 4.0):
                assert kept == elsewhere == target
        assert found.activations <= sum(targets)


@pytest.mark.parametrize("redistribution", COMMON)
def test_the_least_and_the_full_budget_are_met(
    moe_model: Models, ids: torch.Tensor, redistribution: Redistribution
) -> None:
    moe = moe_model("olmoe")
    setting = setting_of(moe, redistribution)
    assert common_threshold(moe, ids, setting, 3.0).ks == (1.0, 1.0, 1.0)
    assert common_threshold(moe, ids, setting, 12.0).activations == pytest.approx(12.0, rel=0.005)


@pytest.fixture
def undecided(moe_model: Models) -> Iterator[MoeModel]:
    """A model whose routers give all experts the same weight."""
    moe = moe_model("olmoe")
    layers = find_decoder_layers(moe.model, moe.layers[0])
    gates = [layer.mlp.gate.weight for layer in layers]
    before = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    yield moe
    with torch.no_grad():
        for gate, old in zip(gates, before, strict=True):
            gate.copy_(old)


@pytest.mark.parametrize("redistribution", SCORED)
def test_equal_scores_never_exceed_the_target(
    undecided: MoeModel, ids: torch.Tensor, redistribution: Redistribution
) -> None:
    setting = setting_of(undecided, redistribution)
    found = layer_thresholds(undecided, ids, setting, [2.0, 2.5, 3.0])
    assert found.ks == executed(undecided, ids, setting, found.values)
    assert found.activations <= 7.5
    if redistribution in ("threshold", "ratio"):  # ranks and sizes tell the others apart
        assert set(found.ks) <= {1.0, 4.0}
    if redistribution in COMMON:
        found = common_threshold(undecided, ids, setting, 7.5)
        assert found.ks == executed(undecided, ids, setting, found.values)
        assert found.activations <= 7.5


def test_the_dial_runs_from_all_experts_to_one_per_layer(
    moe_model: Models, ids: torch.Tensor, family: str
) -> None:
    moe = moe_model(family)
    setting = setting_of(moe, "price")
    passes: list[int] = []
    points = measure_dial(moe, ids[:4], setting, advance=passes.append)
    assert passes == [1] * dial_passes()
    most, layers = sum(layer.experts_per_token for layer in moe.layers), len(moe.layers)
    assert (points[0].activations, points[0].price) == (most, 0.0)
    for point, following in itertools.pairwise(points):
        assert following.activations < point.activations
        assert following.price > point.price
    assert layers <= points[-1].activations <= layers + 0.01
    assert len(points) >= 10
    for point in points:
        ran = executed(moe, ids[:4], setting, [point.price] * layers)
        assert point.activations == pytest.approx(sum(ran), rel=1e-12)


VALUES = st.lists(
    st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]) | st.floats(-2, 2, width=32),
    min_size=1,
    max_size=40,
)


@given(VALUES, st.integers(-2, 45))
def test_a_cut_keeps_as_many_as_equal_values_allow(values: list[float], count: int) -> None:
    falling = -np.sort(-np.array(values, np.float32))
    kept = int((falling >= np.float32(_cut(falling, count))).sum())
    possible = [0, *(int((falling >= value).sum()) for value in falling)]
    assert kept == max(n for n in possible if n <= max(count, 0))


@given(VALUES, st.floats(1, 3), st.integers(1, 40))
def test_falling_scores_keep_k_per_token_at_most(
    values: list[float], k: float, tokens: int
) -> None:
    falling = _Falling(torch.tensor(values), tokens)
    threshold = falling.threshold_for(k)
    reached = sum(np.float32(value) >= np.float32(threshold) for value in values)
    assert falling.kept(threshold) == 1 + reached / tokens
    assert falling.kept(threshold) <= k


def test_a_layer_with_one_candidate_has_nothing_to_cut() -> None:
    empty = _Falling(torch.empty(0), 5)
    assert empty.kept(empty.threshold_for(1.0)) == 1.0
