"""Coordinate descent: rounded weights and their scales are moved, one by one, to what costs less.

GPTQ decides each column once, when those behind it are still floats. Here all others are fixed
while one is chosen again: the best scale of each block, then the best values of each column, in
turn, as in CDQuant (arXiv 2406.17542) and QuantEase (2309.01885). What a row costs never rises, and
values stay on their block's grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from alloc_moe.passes.blockwise import BlockFormat

_ROUNDS = 3  # of scales, then values
_COLUMNS = 64  # whose changes reach all columns in one product


def descend(
    weights: torch.Tensor, rounded: torch.Tensor, hessians: torch.Tensor, form: BlockFormat
) -> torch.Tensor:
    """Return rounded weights whose products are as near to the given ones' or nearer.

    The largest value of each block stays at the end of the range, as `round_products` leaves it.

    Args:
        weights: What the products should be those of [matrices, rows, columns] float32.
        rounded: Where to begin, of the same shape: what `dequantize(*quantize(...))` leaves as is.
        hessians: Positive definite sums of x x' over the inputs x [matrices, columns, columns].
        form: How the weights will be stored.

    Returns:
        [matrices, rows, columns] float32, stored as `rounded` is.
    """
    state = _Descent(weights, rounded, hessians, form)
    for _ in range(_ROUNDS):
        state.move_scales()
        state.move_values()
    return state.rounded()


class _Descent:
    """Integers and scales, and half the slope of what they cost.

    The slope is (wanted - rounded) H [M, R, C]: a value moves by slope / H's diagonal to where it
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
        blocks = rounded.view(*rounded.shape[:2], -1, form.block)
        self._pinned = blocks.abs().argmax(3, keepdim=True)
        self._scales = blocks.gather(3, self._pinned)[..., 0] / -self._end  # [M, R, blocks]
        safe = self._scales.where(self._scales != 0, 1.0)
        self._steps = (blocks / safe[..., None]).round().flatten(2)
        self._slope = (weights - rounded) @ hessians

    def rounded(self) -> torch.Tensor:
        """Return the weights as they are now."""
        steps = self._steps.view(*self._scales.shape, self._block)
        return (steps * self._scales[..., None]).flatten(2)

    def move_scales(self) -> None:
        """Give each block the scale that costs least while all else stays."""
        for index in range(self._scales.shape[2]):
            part = slice(index * self._block, (index + 1) * self._block)
            steps = self._steps[..., part]
            products = steps @ self._hessians[:, part]  # [M, R, C]
            curvature = (products[..., part] * steps).sum(2)
            change = (self._slope[..., part] * steps).sum(2) / curvature.where(curvature > 0, 1.0)
            self._scales[..., index] += change
            self._slope -= change[..., None] * products

    def move_values(self) -> None:
        """Give each column in turn the values that cost least while all else stays."""
        columns = self._steps.shape[2]
        for start in range(0, columns, _COLUMNS):
            stop = min(start + _COLUMNS, columns)
            own = self._hessians[:, start:stop, start:stop]
            slope = self._slope[..., start:stop].clone()
            before = self._steps[..., start:stop].clone()
            for column in range(start, stop):
                moved = self._move_column(column, slope[..., column - start])
                slope -= moved[..., None] * own[:, None, column - start]
            scales = self._scales.repeat_interleave(self._block, 2)[..., start:stop]
            changes = (self._steps[..., start:stop] - before) * scales
            self._slope -= changes @ self._hessians[:, start:stop]

    def _move_column(self, column: int, slope: torch.Tensor) -> torch.Tensor:
        """Choose a column's values anew, and return by how much the weights changed [M, R]."""
        block, place = divmod(column, self._block)
        scale = self._scales[..., block]
        curvature = self._hessians[:, column, column, None]
        now = self._steps[..., column].clone()
        wanted = now + slope / (curvature * scale.where(scale != 0, 1.0))
        steps = wanted.round().clamp(-self._end, self._end - 1)
        fixed = (self._pinned[..., block, 0] == place) | (scale == 0)
        steps = torch.where(fixed, now, steps)
        self._steps[..., column] = steps
        return (steps - now) * scale
