"""Coordinate descent: rounded weights and their scales are moved, one by one, to what costs less.

GPTQ decides each column once, when those behind it are still floats. Here all others are fixed
while one is chosen again: a block's best scale, then the best values of its columns, in turn, as in
CDQuant (arXiv 2406.17542) and QuantEase (2309.01885). What a row costs never rises, and values stay
on their block's grid.
"""

from __future__ import annotations

import torch

from alloc_moe.compiler.rounding.grid import Grid, inverse_of

_COLUMNS = 32  # whose changes reach those behind them in one product


def descend(weights: torch.Tensor, grid: Grid, hessians: torch.Tensor, *, rounds: int) -> None:
    """Move rounded weights, in place, to where their products are as near to the given ones'.

    The largest value of each block stays at the end of the range, as `round_products` leaves it.

    Args:
        weights: What the products should be those of [matrices, columns, rows] float32.
        grid: The rounded weights.
        hessians: Positive definite sums of x x' over the inputs x [matrices, columns, columns].
        rounds: How often all blocks are gone through.
    """
    errors = weights - grid.values()
    for _ in range(rounds):
        for index in range(grid.scales.shape[1]):
            _move_block(grid, index, errors, hessians)


def _move_block(grid: Grid, index: int, errors: torch.Tensor, hessians: torch.Tensor) -> None:
    """Give a block the scale, then the values that cost least; errors [M, C, R] follow.

    Half the slope of what a row costs is H (wanted - rounded): a value moves by that, divided by
    H's diagonal, to where it costs least.
    """
    some = slice(index * grid.block, (index + 1) * grid.block)
    own, steps, scale = hessians[:, some, some], grid.steps[:, some], grid.scales[:, index, None]
    slope = hessians[:, some] @ errors
    error = errors[:, some].addcmul_(steps, scale)
    products = own @ steps
    curvature = (products * steps).sum(1, keepdim=True)
    change = (slope * steps).sum(1, keepdim=True) / curvature.where(curvature > 0, 1.0)
    scale += change
    slope.addcmul_(products, change, value=-1)
    diagonal = own.diagonal(dim1=1, dim2=2)[:, :, None]
    highest = grid.highest[:, some]
    _move_values(steps, scale[:, 0], highest, slope.div_(diagonal), own / diagonal, grid.end)
    error.addcmul_(steps, scale, value=-1)


def _move_values(
    steps: torch.Tensor,
    scale: torch.Tensor,
    highest: torch.Tensor,
    wishes: torch.Tensor,
    own: torch.Tensor,
    end: int,
) -> None:
    """Choose the values of a block anew, one column after the other.

    Wishes [M, block, R] are how far each weight would move, were it no integer; by `own` they
    change with what others move.
    """
    inverse, lowest = inverse_of(scale), torch.full_like(scale, -end)
    for start in range(0, steps.shape[1], _COLUMNS):
        some, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        wished, moved = wishes[:, some], torch.empty_like(wishes[:, some])
        shares = own[:, some, some, None]
        given = (steps[:, some], wished, highest[:, some], moved)
        columns = zip(*(each.unbind(1) for each in given), strict=True)
        for index, (step, wish, most, change) in enumerate(columns):
            torch.addcmul(step, wish, inverse, out=change).round_().clamp_(lowest, most).sub_(step)
            step += change
            change *= scale
            ahead = slice(index + 1, None)
            wished[:, ahead].addcmul_(shares[:, ahead, index], change[:, None], value=-1)
        wishes[:, behind].baddbmm_(own[:, behind, some], moved, alpha=-1)
