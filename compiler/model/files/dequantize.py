"""Quantised tensors -> float32, exactly as their formats define it."""

from __future__ import annotations

import torch

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_NAN = 255
_MX_BLOCK = 32


def scales_shape(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return how many rows and columns of a weight share one of its scales; None if they can't.

    Args:
        weight: Shape of the weight: [..., rows, columns].
        scale: Shape of the scales.
        block: Rows and columns of a block, if the checkpoint has blocks.
    """
    *before, rows, columns = weight
    if _count(scale) == 1 and not before:  # one for the whole tensor
        return rows, columns
    if before and _without_ones(scale) == _without_ones(tuple(before)):  # one for each expert
        return rows, columns
    if scale in ((*before, rows), (*before, rows, 1)):  # one for each output
        return 1, columns
    if block is not None:
        grid = -(-rows // block[0]), -(-columns // block[1])
        if scale == (*before, *grid):
            return block
    return None


def undo_scales(weight: torch.Tensor, scale: torch.Tensor, shared: tuple[int, int]) -> torch.Tensor:
    """Return float8 weights times their scales in float32.

    Args:
        weight: [..., rows, columns].
        scale: float32, in any shape that `scales_shape` knows.
        shared: The rows and columns that share a scale; the last block may have fewer.
    """
    values = weight.to(torch.float32)
    *before, rows, columns = values.shape
    down, across = -(-rows // shared[0]), -(-columns // shared[1])
    scale = scale.reshape(*before, down, across)
    # A strip of columns at a time: scales as large as the weights would double the memory.
    for strip in range(across):
        by_row = scale[..., strip].repeat_interleave(shared[0], dim=-1)[..., :rows]
        values[..., strip * shared[1] : (strip + 1) * shared[1]].mul_(by_row.unsqueeze(-1))
    return values


def undo_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the experts [experts, inputs, outputs] that gpt-oss stores as 4-bit floats.

    Args:
        blocks: uint8 [experts, outputs, groups, 16]: 32 values, the lower half byte first.
        scales: uint8 [experts, outputs, groups]: exponents, 127 being one.
    """
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    byte = torch.arange(256)
    pairs = torch.stack([table[byte & 15], table[byte >> 4]], dim=-1)  # of each byte
    experts, outputs, groups, _ = blocks.shape
    values = torch.empty(experts, groups * _MX_BLOCK, outputs)
    for expert in range(experts):  # indices of all of them would take four times as much memory
        found = torch.nn.functional.embedding(blocks[expert].int(), pairs)
        scaled = found.reshape(outputs, groups, _MX_BLOCK)
        scaled.mul_(undo_e8m0(scales[expert]).unsqueeze(-1))
        values[expert] = scaled.flatten(-2).T
    return values


def undo_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Return the powers of two that bytes stand for; NaN for the one that says so."""
    powers = torch.exp2(exponents.to(torch.float64) - 127).to(torch.float32)
    return powers.masked_fill(exponents == _E8M0_NAN, torch.nan)


def mxfp4_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of what `undo_mxfp4` gives; None if blocks and scales don't match."""
    if len(blocks) != 4 or blocks[-1] != _MX_BLOCK // 2 or scales != blocks[:-1]:
        return None
    experts, outputs, groups, _ = blocks
    return experts, groups * _MX_BLOCK, outputs


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
