"""Weights in blocks for prompts: decoded, and multiplied by the kernels, emulated, in tiles."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alloc_moe.runtime.cuda.blocks import Blocks
from alloc_moe.runtime.cuda.cublas import Gemm
from alloc_moe.runtime.cuda.records import Launch, Places

pytest.importorskip("alloc_moe.passes.blockwise", reason="quantising needs the compiler's extra")

from alloc_moe.passes.blockwise import BlockFormat, dequantize, quantize

SMALL, LARGE = 101_376, 232_448  # bytes of shared memory
COUNTS = (0, 130, 5)  # of the experts' rows: none, more than a tile, few
HIDDEN, INNER = 96, 160  # no multiples of what is multiplied at once
FORMATS = [BlockFormat(4, 32), BlockFormat(8, 16)]
Quantised = tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float32]]


def _quantised(form: BlockFormat, *shape: int) -> Quantised:
    """Return integers, scales, and what they stand for in float16."""
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed, scales = quantize(weight, form)
    half = scales.astype(np.float16)
    return packed, half, dequantize(packed, half.astype(np.float32), form).astype(np.float16)


def _launch(kernel: str, grid: tuple[int, int], shared: int, *arguments: Any) -> Launch:
    given = [
        ctypes.c_void_p(value.ctypes.data) if isinstance(value, np.ndarray) else ctypes.c_int(value)
        for value in arguments
    ]
    given = [ctypes.c_void_p(0) if value is None else value for value in given]
    return Launch(kernel, (*grid, 1), 256, shared, tuple(given))


def _places(arrays: dict[str, NDArray[Any]]) -> Places:
    def address(name: str, size: int = 0) -> int:
        assert arrays[name].nbytes >= size
        return int(arrays[name].ctypes.data)

    return Places(address, address, address, lambda op: 0, address)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_weight_is_decoded_for_a_product(
    emulator: ModuleType, tmp_path: Path, form: BlockFormat
) -> None:
    packed, scales, weight = _quantised(form, 40, HIDDEN)
    made = np.zeros(weight.shape, np.float16)
    described = {"bits": form.bits, "block": form.block, "scales": "scales"}
    op = {"op": "linear", "out": "b1", "n": 40, "k": HIDDEN, "format": described}
    places = _places({"packed": packed, "scales": scales, "rows.decoded": made})
    blocks = Blocks({"hidden": HIDDEN, "ops": [op]}, places, most_shared=LARGE)
    given = Gemm(1, 2, 3, rows=5, n=40, k=HIDDEN, pitch=HIDDEN, add=True)
    launch, product = blocks.product(given, "packed", described)
    emulator.Emulator([launch.kernel], tmp_path, dtype=0).run(launch)
    np.testing.assert_array_equal(made, weight)
    assert product == Gemm(1, 2, made.ctypes.data, 5, 40, HIDDEN, HIDDEN, add=True)


@pytest.mark.parametrize("most_shared", [SMALL, LARGE])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_experts_in_blocks_are_multiplied(
    emulator: ModuleType, tmp_path: Path, form: BlockFormat, most_shared: int
) -> None:
    random, experts, pairs = np.random.default_rng(1), len(COUNTS), sum(COUNTS)
    x = random.normal(size=(20, HIDDEN)).astype(np.float16)
    rows = random.integers(0, len(x), pairs).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(COUNTS)]).astype(np.int32)
    factors = random.random(pairs).astype(np.float32)
    up, up_scales, up_weight = _quantised(form, experts, 2 * INNER, HIDDEN)
    down, down_scales, down_weight = _quantised(form, experts, HIDDEN, INNER)
    up_bias = random.normal(size=(experts, 2 * INNER)).astype(np.float16)
    down_bias = random.normal(size=(experts, HIDDEN)).astype(np.float16)
    hidden, out = np.zeros((pairs, INNER), np.float16), np.zeros((pairs, HIDDEN), np.float16)
    blocks = Blocks({"hidden": HIDDEN, "ops": []}, _places({}), most_shared=most_shared)
    tile, columns, shared = blocks.expert_tile(form.bits)
    assert shared <= most_shared
    tiles = math.ceil(pairs / 128) + experts
    launches = [
        _launch(
            f"grouped_gate_up_blocks<{HIDDEN}, {tile}>",
            (math.ceil(2 * INNER / columns), tiles),
            shared,
            *(hidden, x, offsets, rows, factors, up, up_scales),
            *(form.block, up_bias, experts, INNER),
        ),
        _launch(
            f"grouped_down_blocks<{INNER}, {tile}>",
            (math.ceil(HIDDEN / columns), tiles),
            shared,
            *(out, hidden, offsets, factors, down, down_scales),
            *(form.block, down_bias, experts, HIDDEN),
        ),
    ]
    emulated = emulator.Emulator([launch.kernel for launch in launches], tmp_path, dtype=0)
    for launch in launches:
        emulated.run(launch)
    expert = np.repeat(np.arange(experts), COUNTS)
    given = x[rows].astype(np.float32)
    made = np.einsum("pk,pnk->pn", given, up_weight[expert].astype(np.float32)) + up_bias[expert]
    gate, factor = made[:, ::2], made[:, 1::2]
    inner = gate / (1 + np.exp(-gate)) * factor * factors[:, None]
    np.testing.assert_allclose(hidden, inner, rtol=2e-3, atol=2e-2)
    ends = np.einsum("pk,pnk->pn", hidden, down_weight[expert], dtype=np.float32)
    ends += factors[:, None] * down_bias[expert]
    np.testing.assert_allclose(out, ends, rtol=2e-3, atol=1e-1)
    assert np.abs(ends).max() > 100
