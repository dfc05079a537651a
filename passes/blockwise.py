"""Symmetric blockwise quantisation, in the layout of onnxruntime's QMoE and MatMulNBits operators.

Along each row of a weight, ``block`` neighbours share a scale: w = scale * (q - 2^(bits - 1)), q
being an unsigned number of ``bits`` bits, two to a byte (the lower half first) where bits is 4. The
rounding is that of onnxruntime's own quantiser: the scale takes the block's largest value to the
end of the range, so it may be negative.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

_QUANTIZERS = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}
_LEAST_BLOCK = 16  # of onnxruntime's kernels
_PART = 1 << 19  # values that a thread takes at a time: a few MB with temporaries, for the cache


@dataclass(frozen=True)
class BlockFormat:
    """How a weight is stored: ``bits`` (4 or 8) per value, ``block`` values per scale."""

    bits: int
    block: int

    @property
    def bits_per_weight(self) -> float:
        """The bits that a value takes with its share of a float32 scale."""
        return self.bits + 32 / self.block

    def packed_columns(self, columns: int) -> int:
        """Return the bytes that a row of `columns` values takes, without its scales."""
        return columns * self.bits // 8


def block_that_fits(block: int, columns: Sequence[int]) -> int | None:
    """Return the largest power of two up to `block` that divides all of `columns`, None below 16.

    Args:
        block: A power of two.
        columns: Row lengths.
    """
    while block >= _LEAST_BLOCK:
        if all(count % block == 0 for count in columns):
            return block
        block //= 2
    return None


def quantize(weights: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return packed values and scales.

    Args:
        weights: [..., rows, columns] float; ``form.block`` divides the columns.
        form: How to store them.

    Returns:
        [..., rows, columns * bits / 8] uint8 and [..., rows, columns / block] float32.
    """
    *outer, rows, columns = weights.shape
    blocks, per_byte = columns // form.block, 8 // form.bits
    packed = np.empty((*outer, rows, form.packed_columns(columns)), np.uint8)
    scales = np.empty((*outer, rows, blocks), np.float32)
    # Neither weights that are transposed nor those of a smaller type are copied as a whole.
    matrices = weights.reshape(-1, rows, columns)
    targets = packed.reshape(len(matrices), 1, rows * blocks, form.block // per_byte)
    factors = scales.reshape(len(matrices), rows * blocks)
    unused = np.zeros(rows * -(-blocks // per_byte), np.uint8)
    for matrix, values, steps in zip(matrices, targets, factors, strict=True):
        # As one column, in which its blocks follow each other: the quantiser wants a transpose.
        column = np.ascontiguousarray(matrix, np.float32).reshape(-1, 1)
        _QUANTIZERS[form.bits](values, column, steps, unused, form.block, 1, column.size, True)
    return packed, scales


def dequantize(
    packed: np.ndarray, scales: np.ndarray, form: BlockFormat, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Return the float32 weights [..., columns] that the kernels compute with.

    Args:
        packed: [..., columns * bits / 8] uint8.
        scales: [..., columns / block] float32.
        form: How they are stored.
        out: Where to put the weights, float32 and contiguous; a new array by default.
    """
    *outer, blocks = scales.shape
    if out is None:
        out = np.empty((*outer, blocks * form.block), np.float32)
    elif (
        out.dtype != np.float32
        or out.size != scales.size * form.block
        or not out.flags.c_contiguous
    ):
        raise ValueError(f"Weights of {form} can't be put into {out.dtype} of {out.shape}.")
    values = packed.reshape(scales.size, -1)
    factors, weights = scales.reshape(-1, 1), out.reshape(scales.size, form.block)
    step = max(1, _PART // form.block)

    def dequantize_part(part: slice) -> None:
        taken = values[part]
        if form.bits == 4:
            pairs = taken.astype("<u2")
            pairs |= pairs << 4
            pairs &= 0x0F0F
            taken = pairs.view(np.uint8)
        # Less than zero wraps round, which is what the signed view wants; floats take longer.
        weights[part] = (taken - np.uint8(1 << (form.bits - 1))).view(np.int8)
        weights[part] *= factors[part]

    _in_threads(dequantize_part, [slice(i, i + step) for i in range(0, scales.size, step)])
    return out


def _in_threads(task: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Run a task, whose numpy operations let other threads run, for all parts."""
    if len(parts) == 1:
        task(parts[0])
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(task, parts):
            pass
