"""GPTQ: weights are rounded column by column, and those left make up for each error.

The method is that of arXiv 2210.17323, with blocks whose scales are fixed before (section 3.3) and
an order of columns (the authors' "act-order").

What counts is the error of a product: for inputs x the squares of (W - rounded) x, which depend on
the inputs through H = sum of x x' alone. Columns go in the order of their size in H, the largest
first, while most others are left to make up for them. A block's scale is fixed before: the largest
weight's, or smaller by one of `RATIOS`, whichever rounds the block best by itself. Narrow matrices
take no time, so there each ratio is tried on whole rows too, as rows don't depend on others.

The largest weight of a block always takes the end of the range. So the quantiser that rounds to the
nearest finds the same scale and the same values in the rounded weights: they need no format of
their own.

What columns got while others were still floats is then chosen again, by `descend`, unless the
matrix is so wide that this would take as long as all the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.rounding.descent import descend
from alloc_moe.compiler.rounding.grid import Grid, in_blocks, inverse_of

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

RATIOS = (1.0, 0.95, 0.9, 0.85)
"""Scales to try, relative to the one that reaches a block's largest weight."""

THOROUGH = 512
"""Columns up to which a matrix is rounded in every way there is; wider ones take hours so."""

DESCENDED = 1024
"""Columns up to which it is descended from at all: that takes 2 rows columns^2 operations."""

_DAMPING = 0.01  # added to H's diagonal, relative to its mean: the paper's
_RIDGE = 0.1  # the same, of products to restore
_COLUMNS = 64  # whose errors reach the columns behind in one product
_PART = 1 << 22  # weights rounded at a time: some 150 MB with temporaries
_MOST_WORKERS = 8  # each has a part
_ROUNDS = 3  # of descent
_TINY = 1e-20


def round_products(
    weights: torch.Tensor, hessians: torch.Tensor, form: BlockFormat
) -> torch.Tensor:
    """Return rounded weights whose products with the inputs stay close to the given ones'.

    Args:
        weights: [matrices, rows, columns] float32.
        hessians: Sums of x x' over the inputs x of each matrix [matrices, columns, columns],
            float32 and finite. Zeros weigh all columns alike.
        form: How the weights will be stored.

    Returns:
        [matrices, rows, columns] float32: what `dequantize(*quantize(...))` leaves as it is.
    """
    columns = weights.shape[2]
    rounds = _ROUNDS if columns <= THOROUGH else int(columns <= DESCENDED)
    rounded = torch.empty_like(weights)

    def round_some(some: slice) -> None:
        damped = _damped(hessians[some], _DAMPING)
        order, upper = _factors(damped)
        for part in _slices(weights.shape[1], weights.shape[2]):
            # Columns one after the other, as they are chosen.
            wanted = weights[some, part].mT.contiguous()
            grid = _round_columns(wanted, damped, order, upper, form)
            if rounds:
                descend(wanted, grid, damped, rounds=rounds)
            rounded[some, part] = grid.values().mT

    with _workers() as workers:
        for _ in workers.map(round_some, _slices(len(weights), weights[0].numel())):
            pass  # what failed is raised here
    return rounded


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Yield a thread per core, each of which computes alone.

    Single columns are too little to be shared out: threads that wait for each other at every one
    took ten times as long beside other work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, _MOST_WORKERS)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


def _slices(count: int, size: int) -> list[slice]:
    """Return which of things of a size go together."""
    step = max(1, _PART // size)
    return [slice(start, start + step) for start in range(0, count, step)]


def restore_products(
    weights: torch.Tensor, hessians: torch.Tensor, drifts: torch.Tensor
) -> torch.Tensor:
    """Return weights that give on drifted inputs x what `weights` gave on the inputs y of before.

    By least squares, with a ridge that draws them to `weights`. This is GPTAQ's asymmetric
    calibration (arXiv 2504.02692), solved for all columns at once.

    Args:
        weights: [matrices, rows, columns] float32.
        hessians: Sums of x x' [matrices, columns, columns].
        drifts: Sums of (y - x) x' [matrices, columns, columns].
    """
    lower = torch.linalg.cholesky(_damped(hessians, _RIDGE))
    moving = torch.cholesky_solve(drifts.mT, lower)
    moving.diagonal(dim1=1, dim2=2).add_(1)
    return multiplied(weights, moving.mT)


def multiplied(weights: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return the products of [M, R, C] and [M, C, N], laid out by columns as they are rounded."""
    return torch.bmm(by.mT, weights.mT).mT


def _damped(hessians: torch.Tensor, share: float) -> torch.Tensor:
    """Return H [M, C, C] with a share of its diagonal's mean added to the diagonal."""
    damped = hessians.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += share * diagonal.mean(1, keepdim=True).clamp(min=_TINY)
    return damped


def _factors(damped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of columns [M, C], and the upper U [M, C, C] with U U' = H in that order."""
    diagonal = damped.diagonal(dim1=1, dim2=2)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    # Flipped, so that the triangle is the upper one: a column's cost then depends on those before.
    flipped = order.flip(1)
    sorted_rows = damped.gather(1, flipped[:, :, None].expand_as(damped))
    lower = torch.linalg.cholesky(sorted_rows.gather(2, flipped[:, None].expand_as(damped)))
    return order, lower.flip(1, 2)


def _round_columns(
    weights: torch.Tensor,
    damped: torch.Tensor,
    order: torch.Tensor,
    upper: torch.Tensor,
    form: BlockFormat,
) -> Grid:
    """Return weights [M, C, R] rounded, with the scales that cost least of those to try."""
    end = 1 << (form.bits - 1)
    full, highest = _reaching(in_blocks(weights, form.block), end)
    tries = [_scales_alone(weights, full, highest, damped, end)]
    if weights.shape[1] <= THOROUGH:
        tries += [full * ratio for ratio in RATIOS]
    wanted, most = _rows(weights, order), _rows(highest, order)
    best, chosen, least = wanted, full, torch.full_like(full[:, :1], torch.inf)
    for scales in tries:
        steps, loss = _compensate(wanted, scales, most, upper, order // form.block, end)
        best = steps if len(tries) == 1 else torch.where(loss < least, steps, best)
        chosen = scales if len(tries) == 1 else torch.where(loss < least, scales, chosen)
        least = torch.minimum(loss, least)
    return Grid(_rows(best, torch.argsort(order)), chosen, highest, end)


def _reaching(blocks: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales [M, blocks, R] of blocks' largest weights, and the highest steps [M, C, R].

    Where several weights are the largest, all of them take the end of the range.
    """
    least, most = blocks.amin(2), blocks.amax(2)
    largest = torch.where(most > -least, most, least)
    scales = largest / -end
    there = largest.masked_fill(largest == 0, torch.inf)[:, :, None]  # zeros have no largest
    highest = torch.full_like(blocks, end - 1).masked_fill_(blocks == there, -end)
    return scales, highest.flatten(1, 2)


def _rows(weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return what rows [M, N] of [M, C, R] hold, [M, N, R]."""
    first = torch.arange(len(weights))[:, None] * weights.shape[1]
    taken = weights.flatten(0, 1).index_select(0, (order + first).flatten())
    return taken.view(*order.shape, -1)


def _scales_alone(
    weights: torch.Tensor, full: torch.Tensor, highest: torch.Tensor, damped: torch.Tensor, end: int
) -> torch.Tensor:
    """Return for each block the scale [M, blocks, R] by which it is best rounded to the nearest.

    Columns are weighed by H's diagonal; ``full`` are the scales of the largest weights.
    """
    importance = damped.diagonal(dim1=1, dim2=2)[:, None]
    block = weights.shape[1] // full.shape[1]
    best = torch.empty_like(full)
    lowest = torch.tensor(-float(end))
    for index in range(full.shape[1]):  # one at a time, which caches hold
        some = slice(index * block, (index + 1) * block)
        scales = torch.stack([full[:, index, None] * ratio for ratio in RATIOS])
        losses = []
        for scale, inverse in zip(scales, inverse_of(scales), strict=True):
            steps = (weights[:, some] * inverse).round_().clamp_(lowest, highest[:, some])
            errors = torch.sub(weights[:, some], steps.mul_(scale), out=steps)
            losses.append(importance[:, :, some] @ errors.square_())
        cheapest = torch.stack(losses).argmin(0, keepdim=True)
        best[:, index] = scales.gather(0, cheapest)[0, :, 0]
    return best


def _compensate(
    weights: torch.Tensor,
    scales: torch.Tensor,
    highest: torch.Tensor,
    upper: torch.Tensor,
    block_of: torch.Tensor,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return steps [M, C, R], columns in their order, and what they cost rows [M, 1, R].

    By Cholesky's factor of H itself, whose inverse GPTQ takes in the other order: the values are
    the same (Babai's nearest plane, arXiv 2507.18553). With z = U'(weights - rounded) a row costs
    the squares of z, and z of a column depends on those before it alone.

    Args:
        weights: What is wanted.
        scales: Of blocks [M, blocks, R].
        highest: What no step may exceed.
        upper: U of `_factors`.
        block_of: The block [M, C] that a column is of.
        end: The lowest step, negated.
    """
    diagonal = upper.diagonal(dim1=1, dim2=2)
    shares = upper / diagonal[:, None]
    goals, lowest = weights.clone(), torch.full_like(weights[:, 0], -end)
    steps, losses = torch.empty_like(weights), torch.zeros_like(weights[:, :1])
    for start in range(0, weights.shape[1], _COLUMNS):
        some, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        scale = _rows(scales, block_of[:, some])
        goal, errors = goals[:, some], torch.empty_like(scale)
        own = shares[:, some, some, None]
        given = (goal, inverse_of(scale), highest[:, some], scale, weights[:, some])
        columns = zip(*(each.unbind(1) for each in (*given, steps[:, some], errors)), strict=True)
        for index, (aim, by, most, size, weight, step, error) in enumerate(columns):
            torch.mul(aim, by, out=step).round_().clamp_(lowest, most)
            torch.addcmul(weight, step, size, value=-1, out=error)
            ahead = slice(index + 1, None)
            goal[:, ahead].addcmul_(own[:, index, ahead], error[:, None])
        left = goal.addcmul_(steps[:, some], scale, value=-1)
        losses.baddbmm_(diagonal[:, None, some].square(), left.square_())
        goals[:, behind].baddbmm_(shares[:, some, behind].mT, errors)
    return steps, losses
