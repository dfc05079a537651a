"""Coordinate descent: rounded weights and their scales are moved, one by one, to what costs less.

GPTQ decides each column once, when those behind it are still floats. Here all others are fixed
while one is chosen again: a block's best scale, then the best values of its columns, in turn, as in
CDQuant (arXiv 2406.17542) and QuantEase (2309.01885). What a row costs never rises, and values stay
on their block's grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

_COLUMNS = 32  # whose changes reach those behind them in one product


def descend(
    weights: torch.Tensor,
    rounded: torch.Tensor,
    hessians: torch.Tensor,
    form: BlockFormat,
    *,
    rounds: int,
) -> torch.Tensor:
    """Return rounded weights whose products are as near to the given ones' or nearer.

    The largest value of each block stays at the end of the range, as `round_products` leaves it.

    Args:
        weights: What the products should be those of [matrices, columns, rows] float32.
        rounded: Where to begin, of the same shape: what `dequantize(*quantize(...))` leaves as is.
        hessians: Positive definite sums of x x' over the inputs x [matrices, columns, columns].
        form: How the weights will be stored.
        rounds: How often all blocks are gone through.

    Returns:
        [matrices, columns, rows] float32, stored as `rounded` is.
    """
    state = _Descent(weights, rounded, hessians, form)
    for _ in range(rounds):
        state.move()
    return state.rounded()


def in_blocks(weights: torch.Tensor, block: int) -> torch.Tensor:
    """Return [M, C, R] as [M, blocks, block, R]."""
    return weights.reshape(len(weights), -1, block, weights.shape[2])


def inverse_of(scales: torch.Tensor) -> torch.Tensor:
    """Return what divides by scales; by those so small that this is no number, it doesn't."""
    return scales.where(scales.abs() >= torch.finfo(scales.dtype).tiny, 1.0).reciprocal()


class _Descent:
    """Integers and scales, and half the slope of what they cost.

    The slope is H (wanted - rounded) [M, C, R]: a value moves by slope / H's diagonal to where it
    costs least.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        rounded: torch.Tensor,
        hessians: torch.Tensor,
        form: BlockFormat,
    ) -> None:
        self._block, self._end = form.block, 1 << (form.bits - 1)
        self._hessians = hessians
        blocks = in_blocks(rounded, form.block)
        largest = blocks.abs().argmax(2, keepdim=True)
        self._scales = blocks.gather(2, largest)[:, :, 0] / -self._end  # [M, blocks, R]
        inverse = inverse_of(self._scales)
        fixed = (self._scales == 0)[:, :, None].expand_as(blocks)
        self._fixed = fixed.scatter(2, largest, True).flatten(1, 2)
        self._steps = (blocks * inverse[:, :, None]).round().flatten(1, 2)
        self._slope = hessians @ (weights - rounded)

    def rounded(self) -> torch.Tensor:
        """Return the weights as they are now."""
        blocks = in_blocks(self._steps, self._block)
        return (blocks * self._scales[:, :, None]).flatten(1, 2)

    def move(self) -> None:
        """Give each block in turn the scale, then the values that cost least."""
        for index in range(self._scales.shape[1]):
            part = slice(index * self._block, (index + 1) * self._block)
            own = self._hessians[:, part, part]
            slope, steps = self._slope[:, part].clone(), self._steps[:, part]
            before = steps * self._scales[:, index, None]
            self._move_scale(index, steps, slope, own)
            for start in range(0, self._block, _COLUMNS):
                self._move_values(index, steps, slope, own, start)
            change = before.sub_(steps * self._scales[:, index, None])
            self._slope.baddbmm_(self._hessians[:, :, part], change)

    def _move_scale(
        self, index: int, steps: torch.Tensor, slope: torch.Tensor, own: torch.Tensor
    ) -> None:
        """Choose the scale of a block anew, and let its slope [M, block, R] follow."""
        products = own @ steps
        curvature = (products * steps).sum(1)
        change = (slope * steps).sum(1) / curvature.where(curvature > 0, 1.0)
        self._scales[:, index] += change
        slope -= products.mul_(change[:, None])

    def _move_values(
        self, index: int, steps: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, start: int
    ) -> None:
        """Choose the values of some columns of a block anew; the slope of those behind follows."""
        scale = self._scales[:, index]
        inverse = inverse_of(scale)
        fixed = self._fixed[:, index * self._block : (index + 1) * self._block]
        stop = min(start + _COLUMNS, self._block)
        moved = torch.empty_like(slope[:, start:stop])
        for column in range(start, stop):
            now, change = steps[:, column], moved[:, column - start]
            torch.mul(slope[:, column], inverse, out=change).div_(own[:, column, column, None])
            change.add_(now).round_().clamp_(-self._end, self._end - 1).sub_(now)
            change.masked_fill_(fixed[:, column], 0)
            now += change
            change *= scale
            ahead = slice(column + 1, stop)
            slope[:, ahead].addcmul_(own[:, ahead, column, None], change[:, None], value=-1)
        slope[:, stop:].baddbmm_(own[:, stop:, start:stop], moved, alpha=-1)
