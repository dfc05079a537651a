from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.attention.quantize_cache import CacheScales, QuantizeCachePass

HEADS, SIZE = 2, 8
Run = Callable[..., Any]


@pytest.fixture
def scales(rng: np.random.Generator) -> CacheScales:
    """Of two layers: a step of keys, a step of values, for every head and channel."""
    steps = rng.uniform(0.02, 0.06, (2, 2, HEADS, SIZE)).astype(np.float32)
    return {slot: (steps[slot, 0], steps[slot, 1]) for slot in range(2)}


def attention() -> ir.Model:
    """Return two layers of GroupQueryAttention with the same queries, keys and values."""
    floats, width = ir.DataType.FLOAT, HEADS * SIZE
    rows = [ir.val(name, floats, ["b", "s", width]) for name in ("query", "key", "value")]
    last = ir.val("last", ir.DataType.INT32, ["b"])
    total = ir.val("total", ir.DataType.INT32, [])
    bias = ir.val("bias", floats, ["b", 1, "s", "t"])
    inputs, outputs, nodes = [*rows, last, total, bias], [], []
    for slot in range(2):
        shape = ["b", HEADS, "p", SIZE]
        kinds = ("key", "value")
        past = [ir.val(f"past_key_values.{slot}.{kind}", floats, shape) for kind in kinds]
        node = ir.node(
            "GroupQueryAttention",
            [*rows, *past, last, total, None, None, None, bias],
            {"num_heads": HEADS, "kv_num_heads": HEADS},
            domain="com.microsoft",
            num_outputs=3,
        )
        names = (f"output.{slot}", f"present.{slot}.key", f"present.{slot}.value")
        for value, name in zip(node.outputs, names, strict=True):
            value.name, value.type = name, ir.TensorType(floats)
        inputs += past
        outputs += node.outputs
        nodes.append(node)
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def call(rng: np.random.Generator, batch: int, past: int, sequence: int) -> dict[str, NDArray[Any]]:
    """Return inputs with a left-padded first row and an int8 cache."""
    rows = {
        name: rng.normal(size=(batch, sequence, HEADS * SIZE)) for name in ("query", "key", "value")
    }
    bias = np.zeros((batch, 1, sequence, past + sequence))
    bias[0, :, :, 0] = -1e9
    floats = {name: value.astype(np.float32) for name, value in {**rows, "bias": bias}.items()}
    cache = {
        f"past_key_values.{slot}.{kind}": rng.integers(
            -128, 128, (batch, HEADS, past, SIZE), dtype=np.int8
        )
        for slot in range(2)
        for kind in ("key", "value")
    }
    total = past + sequence
    lengths = {"last": np.full(batch, total - 1, np.int32), "total": np.array(total, np.int32)}
    return {**floats, **cache, **lengths}


def rounded(inputs: dict[str, NDArray[Any]], scales: CacheScales) -> dict[str, NDArray[Any]]:
    """Return inputs for a float cache that mean the same: all of it rounded, and so what is new."""
    floats = dict(inputs)
    for slot, pair in scales.items():
        for kind, scale in zip(("key", "value"), pair, strict=True):
            name = f"past_key_values.{slot}.{kind}"
            floats[name] = inputs[name].astype(np.float32) * scale[None, :, None]
    for kind, scale in zip(("key", "value"), scales[0], strict=True):
        steps = np.clip(np.rint(inputs[kind] / scale.reshape(-1)), -128, 127)
        floats[kind] = (steps * scale.reshape(-1)).astype(np.float32)
    return floats


@pytest.mark.parametrize(
    ("batch", "past", "sequence"), [(2, 0, 5), (2, 4, 1), (1, 4, 3), (1, 600, 1)]
)
def test_the_operator_computes_with_the_rounded_cache(
    run: Run, rng: np.random.Generator, scales: CacheScales, batch: int, past: int, sequence: int
) -> None:
    inputs = call(rng, batch, past, sequence)
    same = dict.fromkeys(range(2), scales[0])  # the layers have the same keys
    model = attention()
    expected = run(model, rounded(inputs, same))
    assert QuantizeCachePass(same)(model).modified
    found = run(model, inputs)
    start = 1 if past == 0 else 0  # the first token of a prompt that is padding sees nothing
    np.testing.assert_allclose(found[0][:, start:], expected[0][:, start:], rtol=1e-4, atol=1e-5)
    assert found[1].dtype == np.int8
    keys = found[1] * scales[0][0][None, :, None]
    np.testing.assert_allclose(keys, expected[1], rtol=1e-5, atol=1e-6)


def test_each_layer_has_its_own_scales(scales: CacheScales) -> None:
    model = attention()
    QuantizeCachePass(scales)(model)
    for slot, node in enumerate(model.graph):
        names = [value.name for value in node.inputs[12:] if value is not None]
        assert names == [f"alloc_moe.k_scale.{slot}", f"alloc_moe.v_scale.{slot}"]
        for name, scale in zip(names, scales[slot], strict=True):
            tensor = model.graph.initializers[str(name)].const_value
            assert tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), scale[None, :, None])
        assert node.attributes["kv_cache_bit_width"].as_int() == 8
        assert node.attributes["k_quant_type"].as_string() == "PER_CHANNEL"
        assert node.attributes["v_quant_type"].as_string() == "PER_CHANNEL"
    types = {str(value.name): value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    cache = {name for name, dtype in types.items() if dtype == ir.DataType.INT8}
    slots = {f"{slot}.{kind}" for slot in range(2) for kind in ("key", "value")}
    assert cache == {f"{side}.{slot}" for side in ("past_key_values", "present") for slot in slots}


def test_a_second_run_changes_nothing(scales: CacheScales) -> None:
    model = attention()
    QuantizeCachePass(scales)(model)
    assert not QuantizeCachePass(scales)(model).modified


def test_without_scales_nothing_happens() -> None:
    model = attention()
    assert not QuantizeCachePass({})(model).modified
    assert all(len(node.inputs) == 11 for node in model.graph)


def test_a_float_cache_that_is_left_is_reported(scales: CacheScales) -> None:
    with pytest.raises(ir.passes.PostconditionError, match=r"slots \[0, 1\] are not quantised"):
        QuantizeCachePass(scales).ensures(attention())
