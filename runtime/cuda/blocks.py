"""Weights in blocks of bits, in calls of many tokens: decoded first, or by the kernels they go to.

cuBLAS takes 16-bit weights, so those of dense products are decoded into memory that all layers
share. A layer's experts are too many for that: their kernels decode what they multiply.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from alloc_moe.runtime.cuda.cublas import Gemm
from alloc_moe.runtime.cuda.records import Launch, Operation, Places, Program

_VEC = 8  # elements that a thread decodes
_MOST_BLOCKS = 1 << 14
_ELEMENT = 2  # bytes
_TILE, _DEPTH = 128, 64  # of kernels/grouped_blocks.cu
_WIDE, _NARROW = (256, 4, 3), (128, 3, 2)  # columns, stages, those of decoded columns
_HEAD_WARPS = 4
_GROUP = 8  # tokens of one product

_int, _pointer = ctypes.c_int, ctypes.c_void_p

Format = Mapping[str, Any]


class Blocks:
    """Plans work with weights in blocks.

    Args:
        program: The step program.
        places: Addresses.
        most_shared: Bytes of shared memory that a block of threads can have.
    """

    def __init__(self, program: Program, places: Places, *, most_shared: int) -> None:
        self._places, self._most_shared = places, most_shared
        self._decoded_bytes = most_decoded(program) * _ELEMENT

    def product(self, gemm: Gemm, name: str, form: Format) -> tuple[Launch, Gemm]:
        """Return what decodes a weight [n, k], and a product of it instead of the given one."""
        decoded = self._places.buffer("rows.decoded", self._decoded_bytes)
        vecs = gemm.n * gemm.k // _VEC
        arguments = (
            *(_pointer(decoded), _pointer(self._places.weight(name))),
            *(_pointer(self._places.weight(form["scales"])), _int(form["block"]), _int(vecs)),
        )
        grid = (min(math.ceil(vecs / 256), _MOST_BLOCKS), 1, 1)
        launch = Launch(f"decode_weight<{form['bits']}>", grid, 256, 0, arguments)
        return launch, dataclasses.replace(gemm, weight=decoded)

    def head(self, op: Operation, *, out: int, x: int, tokens: int) -> Launch:
        """Return what computes logits [tokens, n] of rows x [tokens, k], of 16 at the most."""
        form, n, k = op["format"], op["n"], op["k"]
        kernel = f"linear<{k}, {form['bits']}, {math.ceil(tokens / _GROUP)}, {_HEAD_WARPS}, false>"
        weight, nothing, zero = self._places.weight, _pointer(0), ctypes.c_float(0.0)
        bias = _pointer(weight(op["bias"])) if op.get("bias") else nothing
        arguments = (
            *(_pointer(out), _pointer(x), _int(k), _pointer(weight(op["weight"]))),
            *(_pointer(weight(form["scales"])), _int(form["block"]), bias, nothing),
            *(nothing, zero, zero, _int(n), _int(tokens)),
        )
        return Launch(kernel, (math.ceil(n / 16), 1, 1), _HEAD_WARPS * 32, 0, arguments)

    def expert_tile(self, bits: int) -> tuple[str, int, int]:
        """Return what a kernel's name says of its tiles, their columns, and shared memory."""
        tile = _WIDE if self._most_shared >= _tile_bytes(bits, *_WIDE) else _NARROW
        return ", ".join(map(str, (bits, *tile))), tile[0], _tile_bytes(bits, *tile)


def most_decoded(program: Program) -> int:
    """Return the elements of the largest weight that is decoded for cuBLAS."""
    hidden, sizes = int(program["hidden"]), [0]
    for op in program["ops"]:
        if op["op"] == "linear" and op.get("format") and op["out"] != "logits":
            sizes.append(op["n"] * op["k"])
        elif (shared := op.get("shared") or {}).get("format"):
            sizes.append(2 * shared["intermediate"] * hidden)
    return max(sizes)


def _tile_bytes(bits: int, columns: int, stages: int, decoded_stages: int) -> int:
    elements = (stages * _TILE + decoded_stages * columns) * _DEPTH * _ELEMENT
    return elements + (stages - 1) * columns * _DEPTH * bits // 8 + 1024
