"""GPTQ on single matrices: what it costs, and that the stored format holds what it gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.rounding import gptq
from alloc_moe.compiler.rounding.gptq import restore_products, round_products
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

FORMATS = [BlockFormat(4, 64), BlockFormat(4, 16), BlockFormat(8, 32)]


def nearest(weights: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    return torch.from_numpy(dequantize(*quantize(weights.numpy(), form), form))


def error(rounded: torch.Tensor, weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the squared error of the products of each matrix."""
    return (inputs @ (rounded - weights).mT).double().square().sum((1, 2))


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    """Return inputs [matrices, tokens, columns] whose columns go together."""
    random = torch.Generator().manual_seed(1)
    few = torch.randn(3, 200, 12, generator=random) @ torch.randn(3, 12, 64, generator=random)
    return few + 0.2 * torch.randn(3, 200, 64, generator=random)


@pytest.fixture(params=["narrow", "wide", "widest"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 64 columns count as few, as many and as too many for descent."""
    if request.param != "narrow":
        monkeypatch.setattr(gptq, "THOROUGH", 32)
    if request.param == "widest":
        monkeypatch.setattr(gptq, "DESCENDED", 32)


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_correlated_inputs_keep_more_than_with_the_nearest_values(
    weights: torch.Tensor, inputs: torch.Tensor, form: BlockFormat
) -> None:
    rounded = round_products(weights, inputs.mT @ inputs, form)
    left = error(rounded, weights, inputs) / error(nearest(weights, form), weights, inputs)
    assert left.max() < 0.5


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_independent_columns_are_no_worse_than_the_nearest(
    weights: torch.Tensor, form: BlockFormat
) -> None:
    every = torch.eye(64).expand(3, 64, 64)
    rounded = round_products(weights, every, form)
    expected = error(nearest(weights, form), weights, every)
    assert (error(rounded, weights, every) <= expected * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(FORMATS),
    size=st.sampled_from([1e-42, 1e-38, 1e-8, 1e-3, 1.0, 1e4]),
    zeros=st.booleans(),
    tokens=st.integers(0, 80),
)
def test_the_stored_format_holds_what_was_rounded(
    seed: int, form: BlockFormat, size: float, zeros: bool, tokens: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = size * torch.randn(2, 5, 128, generator=random)
    if zeros:
        weights[:, 1, : form.block] = 0
        weights[:, 2] = 0
    inputs = torch.randn(2, tokens, 128, generator=random)
    rounded = round_products(weights, inputs.mT @ inputs, form)
    assert torch.equal(nearest(rounded, form), rounded)
    if zeros:
        assert not rounded[:, 1, : form.block].any()
        assert not rounded[:, 2].any()


@pytest.mark.usefixtures("width")
def test_rows_are_rounded_alike_together_and_apart(
    weights: torch.Tensor, inputs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = inputs.mT @ inputs
    together = round_products(weights, sums, FORMATS[0])
    monkeypatch.setattr(gptq, "_PART", 1)
    torch.testing.assert_close(round_products(weights, sums, FORMATS[0]), together)


def test_products_are_restored_on_inputs_that_drifted(
    weights: torch.Tensor, inputs: torch.Tensor
) -> None:
    drifted = inputs * torch.linspace(0.7, 1.3, 64)
    sums, drift = drifted.mT @ drifted, (inputs - drifted).mT @ drifted
    restored = restore_products(weights, sums, drift)
    wanted = inputs @ weights.mT
    before = (drifted @ weights.mT - wanted).square().sum()
    assert (drifted @ restored.mT - wanted).square().sum() < 0.2 * before


def test_products_of_the_same_inputs_leave_weights_as_they_are(
    weights: torch.Tensor, inputs: torch.Tensor
) -> None:
    sums = inputs.mT @ inputs
    torch.testing.assert_close(restore_products(weights, sums, torch.zeros_like(sums)), weights)
