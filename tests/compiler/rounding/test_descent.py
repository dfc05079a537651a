"""Coordinate descent from rounded weights: what rows cost never rises, values stay storable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc_moe.compiler.rounding.descent import descend
from alloc_moe.compiler.rounding.grid import Grid, in_blocks, inverse_of
from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

FORMATS = [BlockFormat(4, 64), BlockFormat(4, 16), BlockFormat(8, 32)]


def nearest(weights: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    return torch.from_numpy(dequantize(*quantize(weights.numpy(), form), form))


def drawn(seed: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [matrices, rows, columns] and sums of inputs whose columns go together."""
    random = torch.Generator().manual_seed(seed)
    weights = size * torch.randn(2, 6, 128, generator=random)
    mixed = torch.randn(2, 40, 128, generator=random) @ torch.randn(2, 128, 128, generator=random)
    return weights, mixed.mT @ mixed + 5 * torch.eye(128)


def on_grid(stored: torch.Tensor, form: BlockFormat) -> Grid:
    """Return the grid of weights [matrices, rows, columns] that are stored as they are."""
    end = 1 << (form.bits - 1)
    blocks = in_blocks(stored.mT.contiguous(), form.block)
    largest = blocks.abs().argmax(2, keepdim=True)
    scales = blocks.gather(2, largest) / -end
    at_end = torch.where(scales == 0, end - 1.0, -end)
    highest = torch.full_like(blocks, end - 1).scatter(2, largest, at_end)
    steps = (blocks * inverse_of(scales)).round()
    return Grid(steps.flatten(1, 2), scales[:, :, 0], highest.flatten(1, 2), end)


def descended(
    weights: torch.Tensor, start: torch.Tensor, sums: torch.Tensor, form: BlockFormat
) -> torch.Tensor:
    """Return what weights become [matrices, rows, columns]."""
    grid = on_grid(start, form)
    descend(weights.mT.contiguous(), grid, sums, rounds=3)
    return grid.values().mT


def costs(rounded: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return what each row costs [matrices, rows]."""
    missing = (rounded - weights).double()
    return ((missing @ sums.double()) * missing).sum(2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(FORMATS),
    size=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    zeros=st.booleans(),
)
def test_no_row_costs_more_and_the_format_holds_it(
    seed: int, form: BlockFormat, size: float, zeros: bool
) -> None:
    weights, sums = drawn(seed, size)
    if zeros:
        weights[:, 1, : form.block] = 0
        weights[:, 2] = 0
    start = nearest(weights, form)
    rounded = descended(weights, start, sums, form)
    before = costs(start, weights, sums)
    assert (costs(rounded, weights, sums) <= before * (1 + 1e-5)).all()
    assert torch.equal(nearest(rounded, form), rounded)
    if zeros:
        assert not rounded[:, 1, : form.block].any()
        assert not rounded[:, 2].any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_columns_that_go_together_make_up_for_each_other(form: BlockFormat) -> None:
    weights, sums = drawn(0)
    start = nearest(weights, form)
    left = costs(descended(weights, start, sums, form), weights, sums) / costs(start, weights, sums)
    assert left.max() < 0.6


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_is_stored_without_an_error_stays(form: BlockFormat) -> None:
    weights, sums = drawn(1)
    stored = nearest(weights, form)
    torch.testing.assert_close(descended(stored, stored, sums, form), stored)


def test_a_wrong_scale_is_put_right() -> None:
    form = FORMATS[0]
    weights = nearest(drawn(2)[0], form)
    alone = torch.eye(128).expand(2, 128, 128)
    torch.testing.assert_close(descended(weights, 0.9 * weights, alone, form), weights)
