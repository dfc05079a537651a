"""Weights on the grids that blocks of them are stored on: integers times a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """Rounded weights [matrices, columns, rows], of which each `block` in a row share a scale.

    Attributes:
        steps: Integers from -end to end - 1, as float32 [M, C, R].
        scales: What they are multiplied by [M, blocks, R].
        highest: What no step may exceed [M, C, R]: end - 1, and -end at a block's largest weight.
        end: The lowest step, negated.
    """

    steps: torch.Tensor
    scales: torch.Tensor
    highest: torch.Tensor
    end: int

    @property
    def block(self) -> int:
        """How many columns share a scale."""
        return self.steps.shape[1] // self.scales.shape[1]

    def values(self) -> torch.Tensor:
        """Return the weights that are stored [M, C, R]; zeros where scales are too small."""
        scales = self.scales.masked_fill(_too_small(self.scales), 0)
        return (in_blocks(self.steps, self.block) * scales[:, :, None]).flatten(1, 2)


def in_blocks(weights: torch.Tensor, block: int) -> torch.Tensor:
    """Return [M, C, R] as [M, blocks, block, R]."""
    return weights.view(len(weights), -1, block, weights.shape[2])


def inverse_of(scales: torch.Tensor) -> torch.Tensor:
    """Return what divides by scales; zero for those that are too small."""
    return scales.reciprocal().masked_fill_(_too_small(scales), 0)


def _too_small(scales: torch.Tensor) -> torch.Tensor:
    """Return which scales onnxruntime's quantiser can't divide by."""
    return scales.abs() < torch.finfo(scales.dtype).tiny
