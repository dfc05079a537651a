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

What columns got while others were still floats is then chosen again, by `descend`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.rounding.descent import descend, in_blocks, inverse_of

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

RATIOS = (1.0, 0.95, 0.9, 0.85)
"""Scales to try, relative to the one that reaches a block's largest weight."""

THOROUGH = 512
"""Columns up to which a matrix is rounded in every way there is; wider ones take hours so."""

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
    rounds = _ROUNDS if weights.shape[2] <= THOROUGH else 1
    rounded = torch.empty_like(weights)

    def round_some(some: slice) -> None:
        damped = _damped(hessians[some], _DAMPING)
        order, upper = _factors(damped)
        for part in _slices(weights.shape[1], weights.shape[2]):
            # Columns one after the other, as they are chosen.
            wanted = weights[some, part].mT.contiguous()
            first = _round_columns(wanted, damped, order, upper, form)
            rounded[some, part] = descend(wanted, first, damped, form, rounds=rounds).mT

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
    missing = (weights @ drifts).mT
    return weights + torch.cholesky_solve(missing, lower).mT


def _damped(hessians: torch.Tensor, share: float) -> torch.Tensor:
    """Return H [M, C, C] with a share of its diagonal's mean added to the diagonal."""
    damped = hessians.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += share * diagonal.mean(1, keepdim=True).clamp(min=_TINY)
    return damped


def _factors(damped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of columns [M, C], and the upper U [M, C, C] with U'U = inverse of H."""
    diagonal = damped.diagonal(dim1=1, dim2=2)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    # Flipped, so that the triangle is the upper one: then U is its inverse, and H's isn't needed.
    flipped = order.flip(1)
    sorted_rows = damped.gather(1, flipped[:, :, None].expand_as(damped))
    lower = torch.linalg.cholesky(sorted_rows.gather(2, flipped[:, None].expand_as(damped)))
    one = torch.eye(damped.shape[1])
    return order, torch.linalg.solve_triangular(lower.flip(1, 2), one, upper=True)


def _round_columns(
    weights: torch.Tensor,
    damped: torch.Tensor,
    order: torch.Tensor,
    upper: torch.Tensor,
    form: BlockFormat,
) -> torch.Tensor:
    """Return weights [M, C, R] rounded, with the scales that cost least of those to try."""
    end = 1 << (form.bits - 1)
    blocks = in_blocks(weights, form.block)
    largest = blocks.abs().argmax(2, keepdim=True)
    full = blocks.gather(2, largest) / -end  # [M, blocks, 1, R]
    pinned = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, largest, True)
    tries = [_scales_alone(blocks, full, pinned, damped, end)]
    if weights.shape[1] <= THOROUGH:
        tries += [full * ratio for ratio in RATIOS]
    best = weights
    least = torch.full_like(weights[:, :1], torch.inf)
    there = order[:, :, None].expand_as(weights)
    sorted_columns, pins = (each.gather(1, there) for each in (weights, pinned.flatten(1, 2)))
    for scales in tries:
        rounded, loss = _compensate(
            sorted_columns.clone(), scales[:, :, 0], pins, order, upper, form
        )
        best, least = torch.where(loss < least, rounded, best), torch.minimum(loss, least)
    return torch.empty_like(best).scatter_(1, there, best)


def _scales_alone(
    blocks: torch.Tensor,
    full: torch.Tensor,
    pinned: torch.Tensor,
    damped: torch.Tensor,
    end: int,
) -> torch.Tensor:
    """Return for each block the scale [M, blocks, 1, R] by which it is best rounded to the nearest.

    Columns are weighed by H's diagonal; ``full`` are the scales of the largest weights.
    """
    importance = damped.diagonal(dim1=1, dim2=2).view(*blocks.shape[:3], 1)
    best, least = full, torch.full_like(full, torch.inf)
    for ratio in RATIOS:
        scale = full * ratio
        steps = (blocks * inverse_of(scale)).round_().clamp_(-end, end - 1)
        errors = blocks - steps.masked_fill_(pinned, -end).mul_(scale)
        loss = (errors.square_() * importance).sum(2, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def _compensate(
    weights: torch.Tensor,
    scales: torch.Tensor,
    pinned: torch.Tensor,
    order: torch.Tensor,
    upper: torch.Tensor,
    form: BlockFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [M, C, R], columns in their order, in place, and say what that costs rows [M, 1, R].

    Scales are of blocks [M, blocks, R], in the order of before; ``pinned`` are the largest weights.
    """
    inverse = inverse_of(scales)
    each, end = torch.arange(len(weights)), 1 << (form.bits - 1)
    losses = torch.zeros_like(weights[:, 0])
    for start in range(0, weights.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weights.shape[1])
        errors = torch.empty_like(weights[:, start:stop])
        for column in range(start, stop):
            block = order[:, column] // form.block
            wanted = weights[:, column]
            steps = (wanted * inverse[each, block]).round_().clamp_(-end, end - 1)
            rounded = steps.masked_fill_(pinned[:, column], -end).mul_(scales[each, block])
            error = errors[:, column - start]
            torch.sub(wanted, rounded, out=error).div_(upper[:, column, column, None])
            weights[:, column] = rounded
            losses.addcmul_(error, error)
            ahead = slice(column + 1, stop)
            weights[:, ahead].addcmul_(upper[:, column, ahead, None], error[:, None], value=-1)
        weights[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return weights, losses[:, None]
