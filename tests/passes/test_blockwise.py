"""Blockwise rounding, against its definition and against what onnxruntime's operators compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from alloc_moe.passes import blockwise
from alloc_moe.passes.base import MICROSOFT
from alloc_moe.passes.blockwise import BlockFormat, block_that_fits, dequantize, quantize

FORMATS = [BlockFormat(bits, block) for bits in (4, 8) for block in (16, 32, 64)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_weight_is_off_by_at_most_a_step(form: BlockFormat, rng: np.random.Generator) -> None:
    weights = rng.normal(size=(3, 8, 128)).astype(np.float32)
    packed, scales = quantize(weights, form)
    assert packed.shape == (3, 8, 128 * form.bits // 8)
    assert scales.shape == (3, 8, 128 // form.block)
    steps = np.repeat(np.abs(scales), form.block, axis=-1)
    # Half a step, and up to a whole one at the end of the range that has one value less.
    assert (np.abs(dequantize(packed, scales, form) - weights) <= 1.001 * steps).all()


@given(seed=st.integers(0, 10**6), bits=st.sampled_from([4, 8]), scale=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_what_was_rounded_once_stays(seed: int, bits: int, scale: float) -> None:
    form = BlockFormat(bits, 32)
    weights = (np.random.default_rng(seed).normal(size=(4, 64)) * scale).astype(np.float32)
    once = dequantize(*quantize(weights, form), form)
    twice = dequantize(*quantize(once, form), form)
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("form", [*FORMATS, BlockFormat(4, 128), BlockFormat(8, 128)], ids=str)
def test_rounding_is_that_of_onnxruntime_bit_for_bit(
    form: BlockFormat, rng: np.random.Generator
) -> None:
    weights = rng.normal(size=(512, 512)).astype(np.float32)
    weights[:64] = np.round(weights[:64] * 4) / 8  # halves, and extremes of both signs
    weights[64:65] = 0
    weights[65:128] *= 1e-30
    packed, scales = quantize(weights, form)
    theirs = np.zeros((512, 512 // form.block, form.packed_columns(form.block)), np.uint8)
    their_scales = np.zeros(scales.size, np.float32)
    unused = np.zeros(scales.size, np.uint8)
    quantizer = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[form.bits]
    transposed = np.ascontiguousarray(weights.T)
    quantizer(theirs, transposed, their_scales, unused, form.block, 512, 512, True)
    np.testing.assert_array_equal(packed.ravel(), theirs.ravel())
    np.testing.assert_array_equal(scales.ravel().view(np.uint32), their_scales.view(np.uint32))


def naive_dequantize(packed: np.ndarray, scales: np.ndarray, form: BlockFormat) -> np.ndarray:
    numbers = packed if form.bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    centred = numbers.reshape(*scales.shape, form.block).astype(np.float32) - 2 ** (form.bits - 1)
    return (centred * scales[..., None]).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_stored_value_is_read_as_defined(
    form: BlockFormat, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_PART", 3 * 64)  # so that the last part is a smaller one
    packed = rng.integers(256, size=(3, 8, 128 * form.bits // 8), dtype=np.uint8)
    scales = rng.normal(size=(3, 8, 128 // form.block)).astype(np.float32)
    expected = naive_dequantize(packed, scales, form)
    np.testing.assert_array_equal(dequantize(packed, scales, form), expected)
    out = np.empty_like(expected)
    assert dequantize(packed, scales, form, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_and_layout_change_nothing(
    bits: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = BlockFormat(bits, 32)
    weights = rng.normal(size=(3, 7, 128)).astype(np.float16)
    whole = quantize(weights.astype(np.float32), form)
    monkeypatch.setattr(blockwise, "_PART", 2 * 128)
    transposed = np.ascontiguousarray(weights.swapaxes(1, 2)).swapaxes(1, 2)
    for given_weights in (weights, transposed):
        for ours, expected in zip(quantize(given_weights, form), whole, strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "out",
    [np.empty((2, 64)), np.empty((2, 32), np.float32), np.empty((64, 2), np.float32).T],
    ids=["dtype", "shape", "layout"],
)
def test_weights_are_not_put_where_they_do_not_fit(out: np.ndarray) -> None:
    form = BlockFormat(4, 32)
    with pytest.raises(ValueError, match=r"bits=4, block=32\) can't be put into"):
        dequantize(*quantize(np.ones((2, 64), np.float32), form), form, out=out)


def test_weights_of_zero_stay_zero() -> None:
    form = BlockFormat(4, 32)
    assert not dequantize(*quantize(np.zeros((2, 64), np.float32), form), form).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_reads_the_same_weights(
    bits: int,
    session: Callable[[ir.Model], onnxruntime.InferenceSession],
    rng: np.random.Generator,
) -> None:
    form = BlockFormat(bits, 32)
    weights = rng.normal(size=(48, 64)).astype(np.float32)
    packed, scales = quantize(weights, form)
    x = ir.val("x", ir.DataType.FLOAT, ["t", 64])
    constants = [
        ir.val("packed", const_value=ir.tensor(packed.reshape(48, 2, -1), name="packed")),
        ir.val("scales", const_value=ir.tensor(scales, name="scales")),
    ]
    attributes = {"N": 48, "K": 64, "bits": bits, "block_size": 32, "accuracy_level": 0}
    node = ir.node("MatMulNBits", [x, *constants], attributes=attributes, domain=MICROSOFT)
    [y] = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["t", 48])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=constants, opset_imports={"": 21, MICROSOFT: 1}
    )
    inputs = rng.normal(size=(5, 64)).astype(np.float32)
    (output,) = session(ir.Model(graph, ir_version=10)).run(None, {"x": inputs})
    np.testing.assert_allclose(
        output, inputs @ dequantize(packed, scales, form).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("columns", "block"),
    [([128, 64], 64), ([1408, 2048], 64), ([96], 32), ([48], 16), ([40], None)],
)
def test_the_largest_block_that_divides_is_taken(columns: list[int], block: int | None) -> None:
    assert block_that_fits(64, columns) == block


def test_bits_per_weight_count_the_scales() -> None:
    assert BlockFormat(4, 64).bits_per_weight == 4.5
    assert BlockFormat(8, 32).bits_per_weight == 9
