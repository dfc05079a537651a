"""Attention over a cache that is appended to in place, against the exported one that copies it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.attention.group_query import GroupAttentionPass, group_attention

_SPEC = importlib.util.spec_from_file_location(
    "exported_attention", Path(__file__).with_name("exported_attention.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
exported_attention = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(exported_attention)
attention, HEADS, SIZE = (
    getattr(exported_attention, name) for name in ("attention", "HEADS", "SIZE")
)
Run = Callable[..., Any]


def call(
    rng: np.random.Generator, mask: list[list[int]], *, past: int, kv_heads: int = 4, room: int = 0
) -> dict[str, NDArray[Any]]:
    """Return inputs for a mask [batch, past + sequence]; the cache has `room` more columns."""
    batch, sequence = len(mask), len(mask[0]) - past

    def floats(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    angles = floats(batch, sequence, SIZE // 2)
    given = {
        "input_ids": np.zeros((batch, sequence), np.int64),
        "attention_mask": np.array(mask),
        "query": floats(batch, sequence, HEADS * SIZE),
        "key": floats(batch, sequence, kv_heads * SIZE),
        "value": floats(batch, sequence, kv_heads * SIZE),
        "cosine": np.cos(angles),
        "sine": np.sin(angles),
    }
    for n in range(2):
        for kind in ("key", "value"):
            cache = np.full((batch, kv_heads, past + room, SIZE), np.nan, np.float32)
            cache[:, :, :past] = floats(batch, kv_heads, past, SIZE)
            given[f"past_key_values.{n}.{kind}"] = cache
    return given


PREFILL = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
CALLS = {
    "prefill": (PREFILL, 0),
    "one token": ([[1]], 0),
    "continuation": ([[0, 1, 1, 1, 1, 1]], 3),
    "decode": (PREFILL, 4),
}
FEATURES = [{}, {"window": "two"}, {"sinks": True}, {"window": "one", "sinks": True}]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_real_tokens_get_what_they_got(
    run: Run, rng: np.random.Generator, features: dict[str, Any], kv_heads: int, name: str
) -> None:
    mask, past = CALLS[name]
    inputs = call(rng, mask, past=past, kv_heads=kv_heads)
    model = attention(kv_heads=kv_heads, **features)
    before = run(model, inputs)
    assert GroupAttentionPass()(model).modified
    after = run(model, inputs)
    real = np.array(mask)[:, past:] > 0
    np.testing.assert_allclose(after[0][real], before[0][real], rtol=2e-5, atol=1e-6)
    assert np.isfinite(after[0]).all()
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)


def test_another_key_makes_a_difference(run: Run, rng: np.random.Generator) -> None:
    inputs = call(rng, PREFILL, past=4)
    model = attention()
    GroupAttentionPass()(model)
    before = run(model, inputs)[0]
    inputs["past_key_values.1.key"][1, 0, 2, 3] += 0.1
    assert np.abs(run(model, inputs)[0] - before).max() > 1e-4


def test_windows_and_sinks_are_the_operators_own() -> None:
    model = attention(window="two", sinks=True)
    GroupAttentionPass()(model)
    for node in group_attention(model):
        assert node.attributes["local_window_size"].as_int() == 2
        sinks = ir.convenience.get_const_tensor(node.inputs[11])
        assert sinks.numpy().tolist() == [0.5, -1, 2, 0]


def test_the_graph_is_the_operator_and_what_all_layers_share() -> None:
    model = attention()
    GroupAttentionPass()(model)
    layer = ["RotaryEmbedding", "RotaryEmbedding", "GroupQueryAttention"]
    assert [node.op_type for node in model.graph] == ["attended_columns", *layer, *layer]
    node = next(group_attention(model))
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": 4,
        "kv_num_heads": 4,
        "scale": pytest.approx(0.2),
    }
    assert [value and value.name for value in node.inputs[3:]] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "alloc_moe.last_column",
        "alloc_moe.columns",
        None,
        None,
        None,
        "alloc_moe.padding",
    ]
    names = ["output1", *(f"present.{n}.{kind}" for n in range(2) for kind in ("key", "value"))]
    assert [value.name for value in model.graph.outputs] == names


@pytest.mark.parametrize("name", CALLS)
def test_a_buffer_may_be_longer_than_the_past(
    session: Callable[[ir.Model], onnxruntime.InferenceSession],
    run: Run,
    rng: np.random.Generator,
    name: str,
) -> None:
    """Bound to one buffer, past and present are written in place; the rest of it is not read."""
    mask, past = CALLS[name]
    total = len(mask[0])
    inputs = call(rng, mask, past=past, room=20)
    cut = {
        key: value[:, :, :past] if key.startswith("past") else value
        for key, value in inputs.items()
    }
    model = attention()
    expected = run(model, cut)
    GroupAttentionPass()(model)
    loaded = session(model)
    binding = loaded.io_binding()
    for key, value in inputs.items():
        tensor = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(key, tensor)
        if key.startswith("past"):
            name = key.replace("past_key_values", "present")
            binding.bind_ortvalue_output(name, tensor)
    binding.bind_output("output1")
    loaded.run_with_iobinding(binding)
    real = np.array(mask)[:, past:] > 0
    output = binding.get_outputs()[-1].numpy()
    np.testing.assert_allclose(output[real], expected[0][real], rtol=2e-5, atol=1e-6)
    for index, (n, kind) in enumerate((n, kind) for n in range(2) for kind in ("key", "value")):
        buffer = inputs[f"past_key_values.{n}.{kind}"]
        np.testing.assert_allclose(buffer[:, :, :total], expected[1 + index], rtol=1e-6)
        assert np.isnan(buffer[:, :, total:]).all()


def test_a_second_run_changes_nothing() -> None:
    model = attention()
    GroupAttentionPass()(model)
    assert not GroupAttentionPass()(model).modified


@pytest.mark.parametrize(
    "other",
    [
        {"window": "past0"},  # no constant
        {"softcap": 30.0},
        {"value_size": 8},
        {"size": 12},
        {"type_": "float16"},
    ],
    ids=str,
)
def test_what_the_operator_would_compute_otherwise_is_left_alone(other: dict[str, Any]) -> None:
    model = attention(**other)
    before = [node.op_type for node in model.graph]
    assert not GroupAttentionPass()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_a_layer_that_does_not_fit_keeps_all_as_they_are() -> None:
    model = attention()
    second = [node for node in model.graph if node.op_type == "Attention"][1]
    second.attributes["softcap"] = ir.AttrFloat32("softcap", 20.0)
    assert not GroupAttentionPass()(model).modified


def test_an_output_used_otherwise_keeps_its_shape(run: Run, rng: np.random.Generator) -> None:
    model = attention()
    (first,) = [
        value for node in model.graph for value in node.outputs if value.name == "attended0"
    ]
    double = ir.node("Add", [first, first])
    double.outputs[0].name, double.outputs[0].type = "double", first.type
    model.graph.append(double)
    model.graph.outputs.append(double.outputs[0])
    inputs = call(rng, [[1, 1, 1]], past=1)
    before = run(model, inputs)
    assert GroupAttentionPass()(model).modified
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(new, old, rtol=2e-5, atol=1e-6)


def test_a_length_taken_from_the_buffer_is_reported() -> None:
    model = attention()
    GroupAttentionPass()(model)
    past = next(group_attention(model)).inputs[3]
    model.graph.append(ir.node("Shape", [past], name="whole_shape"))
    message = r"past_key_values\.0\.key is read by \['whole_shape'\] too"
    with pytest.raises(ir.passes.PostconditionError, match=message):
        GroupAttentionPass().ensures(model)
