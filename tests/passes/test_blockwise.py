"""Blockwise rounding, against its definition and against what onnxruntime's operators compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
