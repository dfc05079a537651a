"""Token sizes are fitted where they can be, and are nothing where there is nothing to find."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from alloc_moe.compiler.calibration.windows import CalibrationSet
from alloc_moe.compiler.errors import TokenSizesError
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import SensitivityProfile
from alloc_moe.compiler.sensitivity.measuring import measure_sensitivity
from alloc_moe.compiler.sensitivity.token_sizes import fitting
from alloc_moe.compiler.sensitivity.token_sizes.choosing import check_room
from alloc_moe.compiler.sensitivity.token_sizes.fitting import fit_token_sizes
from alloc_moe.compiler.sensitivity.token_sizes.regression import Seen, fit
from alloc_moe.compiler.workspace.states import delete_kept
from alloc_moe.runtime.console import Console

Models = Callable[[str], MoeModel]

EXPERTS, HIDDEN, CANDIDATES, TOKENS = 5, 6, 3, 8192
SIZES = torch.linspace(0.5, 2, EXPERTS)


def seen(truth: torch.Tensor, *, dead: bool = False) -> Seen:
    """Return tokens whose squares are those of normals, their deviations exp(h truth) sizes."""
    random = torch.Generator().manual_seed(4)
    hidden = 2 + 3 * torch.randn(TOKENS, HIDDEN, generator=random)
    hidden[:, -1] = 7.0 if dead else hidden[:, -1]
    ids = torch.rand(TOKENS, EXPERTS, generator=random).topk(CANDIDATES).indices
    deviations = SIZES[ids] * (hidden @ truth).exp().gather(1, ids)
    found = Seen()
    normal = torch.randn(TOKENS, CANDIDATES, generator=random)
    for part in (slice(0, 5000), slice(5000, TOKENS)):
        found.add(hidden[part], ids[part], (deviations * normal)[part].double().square())
    return found


def fitted(given: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    held_out = sum(map(len, given.hidden)) // 8
    return fit(given, SIZES, held_out, torch.Generator().manual_seed(0))[:2]


@pytest.mark.parametrize("dead", [False, True])
def test_a_map_that_made_the_squares_is_found_again(dead: bool) -> None:
    truth = 0.03 * torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(5))
    weights = fitted(seen(truth, dead=dead))[0].numpy()
    rows = slice(0, HIDDEN - 1 if dead else HIDDEN)
    np.testing.assert_allclose(weights[rows], truth.numpy()[rows], atol=0.02)
    assert np.corrcoef(weights[rows].flatten(), truth.numpy()[rows].flatten())[0, 1] > 0.95
    if dead:  # nothing can be known of what doesn't vary
        np.testing.assert_allclose(weights[-1], 0, atol=1e-3)


def test_squares_that_depend_on_nothing_give_next_to_nothing() -> None:
    weights, bias = fitted(seen(torch.zeros(HIDDEN, EXPERTS)))
    assert weights.abs().max() < 0.02
    assert bias.abs().max() < 0.1


def test_what_is_worse_on_text_it_has_not_seen_is_left_out() -> None:
    random = torch.Generator().manual_seed(6)
    found = Seen()
    hidden = torch.randn(64, 48, generator=random)
    ids = torch.rand(64, EXPERTS, generator=random).topk(CANDIDATES).indices
    found.add(
        hidden, ids, SIZES[ids].square() * torch.cat([torch.full((56, 3), 0.01), torch.ones(8, 3)])
    )
    weights, bias = fitted(found)
    assert not weights.any()
    assert not bias.any()


def test_what_float16_does_not_hold_is_told(
    moe_model: Models, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: object) -> tuple[torch.Tensor, ...]:
        return torch.full((2, 2), 1e6), torch.zeros(2), torch.tensor(3e-8)

    monkeypatch.setattr(fitting, "fit", large)
    moe = moe_model("olmoe")
    sizes = [[1.0] * layer.num_experts for layer in moe.layers]
    with pytest.raises(TokenSizesError, match=r"varies by 3e-08 only. Leave it out"):
        fit_token_sizes(moe, calibration, sizes, Console(quiet=True))


def test_a_layer_is_seen_with_what_its_sizes_are_made_of(
    moe_model: Models, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = moe_model("olmoe")
    profile = measure_sensitivity(moe, calibration, metric="fisher")
    layers: list[Seen] = []

    def watched(given: Seen, *_: object) -> tuple[torch.Tensor, ...]:
        layers.append(given)
        return torch.zeros(1, 1), torch.zeros(1), torch.zeros(())

    monkeypatch.setattr(fitting, "fit", watched)
    sizes = [row for row in profile.expert_sizes if row is not None]
    fit_token_sizes(moe, calibration, sizes, Console(quiet=True))
    for layer, row in zip(layers, sizes, strict=True):
        ids, squares = torch.cat(layer.ids).flatten(), torch.cat(layer.squares).flatten()
        assert len(torch.cat(layer.hidden)) == calibration.tokens
        for expert in ids.unique():
            mean = squares[ids == expert].mean().sqrt().item()
            assert row[expert] == pytest.approx(mean, rel=1e-4)


def test_further_text_is_fitted_to_and_the_calibration_text_held_out(
    moe_model: Models, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def watched(given: Seen, _: object, held_out: int, __: object) -> tuple[torch.Tensor, ...]:
        calls.append((sum(map(len, given.hidden)), held_out))
        return torch.zeros(1, 1), torch.zeros(1), torch.zeros(())

    monkeypatch.setattr(fitting, "fit", watched)
    moe, tokens = moe_model("olmoe"), calibration.tokens
    sizes = [[1.0] * layer.num_experts for layer in moe.layers]
    for windows in (0, 3, 56):
        further = np.resize(calibration.ids, (windows, calibration.sequence_length))
        text = dataclasses.replace(calibration, further=further if windows else None)
        fit_token_sizes(moe, text, sizes, Console(quiet=True))
    length = calibration.sequence_length
    alone, some, most = calls[:: len(moe.layers)]
    assert alone == (tokens, tokens // 8)
    assert some == (tokens + 3 * length, tokens)
    assert most == (5 * tokens, tokens)


def test_the_same_text_and_seed_give_the_same(
    moe_model: Models,
    calibration: CalibrationSet,
    profile_of: Callable[[str, str], SensitivityProfile],
) -> None:
    moe, console = moe_model("olmoe"), Console(quiet=True)
    sizes = [row for row in profile_of("olmoe", "fisher").expert_sizes if row is not None]
    state = torch.random.get_rng_state()
    first, again = (fit_token_sizes(moe, calibration, sizes, console) for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("tokens", "windows"), [(127, 0), (128, 0), (127, 1), (25, 4)])
def test_so_little_text_that_it_tells_nothing_is_refused(
    calibration: CalibrationSet, tokens: int, windows: int
) -> None:
    ids = np.resize(calibration.ids, (1, tokens))
    further = np.resize(calibration.ids, (windows, tokens)) if windows else None
    text = dataclasses.replace(calibration, ids=ids, further=further)
    if (1 + windows) * tokens >= 128:
        seen, held_out = fitting._text(text)
        assert (seen.numel(), held_out) == ((windows + 1) * tokens, tokens if windows else 16)
        return
    with pytest.raises(TokenSizesError, match=r"to 128 tokens .* at least, and there are 12[57]"):
        fitting._text(text)


def test_much_text_is_bounded_as_all_layers_see_it_at_once(calibration: CalibrationSet) -> None:
    ids = np.zeros((300, 512), np.int64)
    alone = dataclasses.replace(calibration, ids=ids, sequence_length=512, further=None)
    more = dataclasses.replace(alone, further=np.ones((2000, 512), np.int64))
    sizes = [(found.numel(), held) for found, held in map(fitting._text, (alone, more))]
    assert sizes == [(1 << 16, 1 << 13), (5 << 14, 1 << 14)]


def test_a_model_without_room_for_them_is_refused() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=999))
    layer = SimpleNamespace(num_experts=100)

    def model(layers: int) -> MoeModel:
        return cast("MoeModel", SimpleNamespace(config=config, layers=[layer] * layers))

    check_room(model(200))
    with pytest.raises(TokenSizesError, match="would put 20100000 numbers into"):
        check_room(model(201))


class _KilledError(Exception):
    """What ends a compile in a test."""


@pytest.mark.parametrize("killed_at", [None, 0, 1])
def test_layers_that_are_read_as_they_run_get_the_same_after_a_kill_too(
    checkpoint: Callable[[str], Path],
    calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int | None,
) -> None:
    folder, console = str(checkpoint("deepseek_v2")), Console(quiet=True)
    whole = load_model(folder)
    sizes = [[0.5 + expert for expert in range(each.num_experts)] for each in whole.layers]
    expected = fit_token_sizes(whole, calibration, sizes, console)
    results = tmp_path / "results"
    fits: list[int] = []

    def watched(given: Seen, *others: Any) -> tuple[torch.Tensor, ...]:
        if len(fits) == killed_at:
            fits.append(-1)
            raise _KilledError
        fits.append(len(given.ids))
        return fit(given, *others)

    monkeypatch.setattr(fitting, "fit", watched)
    for _ in range(2 if killed_at is not None else 1):
        streamed = load_model(folder, offload="always", results=results)
        with contextlib.suppress(_KilledError):
            found = fit_token_sizes(streamed, calibration, sizes, console)
    assert found == expected
    assert len(fits) == len(whole.layers) + (killed_at is not None)
    assert fit_token_sizes(streamed, calibration, sizes, console) == expected
    assert len(fits) == len(whole.layers) + (killed_at is not None), "kept ones are made again"
    (tmp_path / "results" / ".tmpAbC123").touch()  # what a kill leaves while safetensors writes
    delete_kept(results, fitting.TOKEN_STATES)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_fit_left_goes_with_the_next_artifact(
    checkpoint: Callable[[str], Path],
    calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object) -> None:
        raise _KilledError

    monkeypatch.setattr(fitting, "fit", killed)
    results = tmp_path / ".out.onnx.passes"
    moe = load_model(str(checkpoint("olmoe")), offload="always", results=results)
    sizes = [[1.0] * layer.num_experts for layer in moe.layers]
    with pytest.raises(_KilledError):
        fit_token_sizes(moe, calibration, sizes, Console(quiet=True))
    assert list(tmp_path.iterdir())
    delete_kept(results, fitting.TOKEN_STATES)
    assert list(tmp_path.iterdir()) == []
