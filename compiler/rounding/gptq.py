"""GPTQ: weights are rounded column by column, and those left make up for each error.

The method is that of arXiv 2210.17323, with blocks whose scales are fixed before (section 3.3) and
an order of columns (the authors' "act-order").

What counts is the error of a product: for inputs x the squares of (W - rounded) x, which depend on
the inputs through H = sum of x x' alone. Columns go in the order of their size in H, the largest
first, while most others are left to make up for them. A block's scale is fixed before: the largest
weight's, or smaller by one of `RATIOS`, each tried for every row, as rows don't depend on others.

The largest weight of a block always takes the end of the range. So the quantiser that rounds to the
nearest finds the same scale and the same values in the rounded weights: they need no format of
their own.

What columns got while others were still floats is then chosen again, by `descend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from alloc_moe.compiler.rounding.descent import descend

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

RATIOS = (1.0, 0.95, 0.9, 0.85)
"""Scales to try, relative to the one that reaches a block's largest weight."""

_DAMPING = 0.01  # added to H's diagonal, relative to its mean: the paper's
_RIDGE = 0.1  # the same, of products to restore
_COLUMNS = 64  # whose errors reach the columns behind in one product
_PART = 1 << 24  # weights rounded at a time, all ratios counted: some 100 MB with temporaries
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
    damped = _damped(hessians, _DAMPING)
    order, upper = _factors(damped)
    rows = max(1, _PART // (len(RATIOS) * weights[:, 0].numel()))
    rounded = [
        descend(part, _round_rows(part, order, upper, form), damped, form)
        for part in torch.split(weights, rows, dim=1)
    ]
    return torch.cat(rounded, dim=1)


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


def _round_rows(
    weights: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, form: BlockFormat
) -> torch.Tensor:
    """Round rows [M, R, C] with each of the ratios, and return the best of every row."""
    matrices, rows, columns = weights.shape
    end = 1 << (form.bits - 1)
    blocks = weights.view(matrices, rows, -1, form.block)
    largest = blocks.abs().argmax(3, keepdim=True)  # [M, R, blocks, 1]
    full = (blocks.gather(3, largest)[..., 0] / -end).mT
    scales = torch.cat([full * ratio for ratio in RATIOS], dim=2)  # [M, blocks, ratios * R]
    places = largest[..., 0] + form.block * torch.arange(blocks.shape[2])
    pinned = places.mT.repeat(1, 1, len(RATIOS))
    there = order[:, :, None].expand(-1, -1, rows)
    sorted_columns = weights.mT.gather(1, there).repeat(1, 1, len(RATIOS))
    losses = _round_columns(sorted_columns, scales, pinned, order, upper, form)
    best = losses.view(matrices, 1, len(RATIOS), rows).argmin(2, keepdim=True)
    tried = sorted_columns.view(matrices, columns, len(RATIOS), rows)
    chosen = tried.gather(2, best.expand(-1, columns, -1, -1))[:, :, 0]
    return torch.empty_like(chosen).scatter_(1, there, chosen).mT.contiguous()


def _round_columns(
    weights: torch.Tensor,
    scales: torch.Tensor,
    pinned: torch.Tensor,
    order: torch.Tensor,
    upper: torch.Tensor,
    form: BlockFormat,
) -> torch.Tensor:
    """Round [M, C, R], columns in their order, in place, and return what that costs rows [M, R]."""
    each = torch.arange(len(weights))
    end = 1 << (form.bits - 1)
    losses = torch.zeros_like(weights[:, 0])
    for start in range(0, weights.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weights.shape[1])
        errors = torch.empty_like(weights[:, start:stop])
        for column in range(start, stop):
            index = order[:, column]
            scale = scales[each, index // form.block]  # [M, R]
            wanted = weights[:, column]
            steps = (wanted / scale.where(scale != 0, 1.0)).round_().clamp_(-end, end - 1)
            steps[pinned[each, index // form.block] == index[:, None]] = -end
            rounded = steps.mul_(scale)
            error = (wanted - rounded).div_(upper[:, column, column, None])
            weights[:, column] = rounded
            errors[:, column - start] = error
            losses.addcmul_(error, error)
            ahead = slice(column + 1, stop)
            weights[:, ahead].baddbmm_(upper[:, column, ahead, None], error[:, None], alpha=-1)
        weights[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return losses
