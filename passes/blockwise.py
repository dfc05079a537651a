"""Symmetric blockwise quantisation, in the layout of onnxruntime's QMoE and MatMulNBits operators.

Along each row of a weight, ``block`` neighbours share a scale: w = scale * (q - 2^(bits - 1)), q
being an unsigned number of ``bits`` bits, two to a byte (the lower half first) where bits is 4. The
rounding is that of onnxruntime's own quantiser: the scale takes the block's largest value to the
end of the range, so it may be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

_QUANTIZERS = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}
_LEAST_BLOCK = 16  # of onnxruntime's kernels


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
        weights: [..., columns] float; ``form.block`` divides the columns.
        form: How to store them.

    Returns:
        [..., columns * bits / 8] uint8 and [..., columns / block] float32.
    """
    *outer, columns = weights.shape
    blocks, per_byte = columns // form.block, 8 // form.bits
    packed = np.empty((*outer, form.packed_columns(columns)), np.uint8)
    scales = np.empty((*outer, blocks), np.float32)
    # One matrix at a time: the quantiser wants its transpose in float32.
    matrices = weights.reshape(-1, *weights.shape[-2:])
    rows = matrices.shape[1]
    unused = np.zeros(rows * -(-blocks // per_byte), np.uint8)
    targets = packed.reshape(len(matrices), rows, blocks, form.block // per_byte)
    for matrix, values, factors in zip(
        matrices, targets, scales.reshape(len(matrices), rows * blocks), strict=True
    ):
        transposed = np.ascontiguousarray(matrix.T, np.float32)
        _QUANTIZERS[form.bits](values, transposed, factors, unused, form.block, rows, columns, True)
    return packed, scales


def dequantize(packed: np.ndarray, scales: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Return the float32 weights [..., columns] that the kernels compute with."""
    values = packed
    if form.bits == 4:
        values = np.stack([packed & 15, packed >> 4], axis=-1)
    centred = values.reshape(*scales.shape, form.block).astype(np.float32)
    centred -= 1 << (form.bits - 1)
    centred *= scales[..., None]
    return centred.reshape(*scales.shape[:-1], -1)
