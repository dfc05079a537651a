"""Attention over a cache that is appended to in place, against the exported one that copies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.attention.group_query import GroupAttentionPass, group_attention

HEADS, SIZE = 4, 16
Run = Callable[..., Any]

_MASK = """
  sequence = Shape<start=1, end=2>(input_ids)
  past1 = Shape<start=2, end=3>(past_key_values__1__value)
  batch = Shape<start=0, end=1>(past_key_values__1__value)
  total = Add(past1, sequence)
  total0 = Squeeze(total)
  past0 = Squeeze(past1)
  keys = Range(zero, total0, one)
  queries = Range(past0, total0, one)
  queries1 = Unsqueeze(queries, axis1)
  causal = LessOrEqual(keys, queries1)
  real = Cast<to=9>(attention_mask)
  real4 = Unsqueeze(real, axes12)
  visible = And(real4, causal)
  {window}
  hidden = Not(seen)
  as_float = Cast<to=1>(hidden)
  mask = Mul(as_float, least)
  counts = Cast<to=1>(seen)
  count = ReduceSum(counts, axis_last)
  blind = Less(count, half)
"""
_WINDOW = """
  near = Sub(queries1, {window})
  recent = Greater(keys, near)
  seen = And(visible, recent)
"""
_SINKS = """
  mask_rows = Shape<start=0, end=3>(mask)
  head_rows = Mul(mask_rows, by_heads)
  mask_shape = Concat<axis=0>(head_rows, total)
  masks = Expand(mask, mask_shape)
  column_shape = Concat<axis=0>(head_rows, axis1)
  column = Expand(sinks, column_shape)
  one_more_column = Add(total, axis1)
  mask_and_sinks = Concat<axis=-1>(masks, column)
"""
_PADDED = "  {kind}_padded{n} = Pad(present__{n}__{kind}, one_more)"
_REPEAT = """
  {kind}_5d{n} = Unsqueeze(present__{n}__{kind}, axis2)
  {kind}_sizes{n} = Concat<axis=0>(batch, kv_heads, groups, {columns}, size)
  {kind}_repeated{n} = Expand({kind}_5d{n}, {kind}_sizes{n})
  {kind}_merged{n} = Concat<axis=0>(batch, heads, {columns}, size)
  {kind}_all{n} = Reshape({kind}_repeated{n}, {kind}_merged{n})
"""
_LAYER = """
  q4{n} = Reshape({query}, split_heads)
  q_heads{n} = Transpose<perm=[0, 2, 1, 3]>(q4{n})
  q_turned{n} = RotaryEmbedding<num_heads=4>(q_heads{n}, cosine, sine)
  k4{n} = Reshape(key, split_kv_heads)
  k_heads{n} = Transpose<perm=[0, 2, 1, 3]>(k4{n})
  k_turned{n} = RotaryEmbedding<num_heads={kv}>(k_heads{n}, cosine, sine)
  v4{n} = Reshape(value, split_kv_heads)
  v_heads{n} = Transpose<perm=[0, 2, 1, 3]>(v4{n})
  present__{n}__key = Concat<axis=-2>(past_key_values__{n}__key, k_turned{n})
  present__{n}__value = Concat<axis=-2>(past_key_values__{n}__value, v_heads{n})
  {repeats}
  attended{n} = Attention<scale=0.2, is_causal=0, softcap={softcap}>(q_turned{n}, {k}, {v}, {mask})
  some{n} = Where(blind, zeros, attended{n})
  rows{n} = Transpose<perm=[0, 2, 1, 3]>(some{n})
  output{n} = Reshape(rows{n}, merge_heads)
"""


def attention(
    *,
    kv_heads: int = 4,
    size: int = SIZE,
    value_size: int | None = None,
    window: str = "",
    sinks: bool = False,
    softcap: float = 0.0,
    type_: str = "float",
) -> ir.Model:
    """Return two layers as they are exported; the second's queries are the first's output."""
    layers, columns = "", "one_more_column" if sinks else "total"
    for n, query in enumerate(("query", "output0")):
        repeated = kv_heads < HEADS
        made = "{kind}_padded{n}" if sinks else "present__{n}__{kind}"
        shapes = [_PADDED, _REPEAT.replace("present__{n}__{kind}", made)]
        steps = "".join(shapes[not sinks : 1 + repeated])
        layers += _LAYER.format(
            n=n,
            query=query,
            kv=kv_heads,
            softcap=softcap,
            repeats="".join(steps.format(n=n, kind=k, columns=columns) for k in ("key", "value")),
            k=f"key_all{n}" if repeated else made.format(n=n, kind="key"),
            v=f"value_all{n}" if repeated else made.format(n=n, kind="value"),
            mask="mask_and_sinks" if sinks else "mask",
        )
    sizes = {"key": size, "value": value_size or size}
    slots = [(n, kind) for n in range(2) for kind in sizes]
    cache = f"{type_}[b, {kv_heads}, {{}}, {{}}] {{}}__{{}}__{{}}"
    past = ", ".join(cache.format("past", sizes[k], "past_key_values", n, k) for n, k in slots)
    present = ", ".join(cache.format("all", sizes[k], "present", n, k) for n, k in slots)
    rows = f"{type_}[b, s, {{}}] {{}}"
    inputs = ", ".join(
        rows.format(width, name)
        for name, width in (
            ("query", HEADS * size),
            ("key", kv_heads * size),
            ("value", kv_heads * sizes["value"]),
            ("cosine", size // 2),
            ("sine", size // 2),
        )
    )
    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
g (int64[b, s] input_ids, int64[b, t] attention_mask, {inputs}, {past})
 => ({rows.format(HEADS * sizes["value"], "output1")}, {present})
<int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis1 = {{1}}, int64[1] axis2 = {{2}},
 int64[2] axes12 = {{1, 2}}, int64[1] axis_last = {{-1}}, float least = {{-3.4e38}},
 float half = {{0.5}}, {type_} zeros = {{0}}, int64[1] kv_heads = {{{kv_heads}}},
 int64 two = {{2}}, int64[3] by_heads = {{1, {HEADS}, 1}},
 float[1, {HEADS}, 1, 1] sinks = {{0.5, -1, 2, 0}}, int64[8] one_more = {{0, 0, 0, 0, 0, 0, 1, 0}},
 int64[1] heads = {{{HEADS}}}, int64[1] groups = {{{HEADS // kv_heads}}},
 int64[1] size = {{{size}}}, int64[4] split_heads = {{0, 0, {HEADS}, {size}}},
 int64[3] merge_heads = {{0, 0, -1}}, int64[4] split_kv_heads = {{0, 0, {kv_heads}, -1}}>
{{
  {_MASK.format(window=_WINDOW.format(window=window) if window else "seen = Identity(visible)")}
  {_SINKS if sinks else ""}
  {layers}
}}
"""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.from_proto(proto)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        value.name = (value.name or "").replace("__", ".")  # the text format has no dots in names
    heads = {"q_turned": HEADS, "k_turned": kv_heads, "v_heads": kv_heads, "attended": HEADS}
    for value in values:  # which shape inference doesn't find
        if (role := (value.name or "").rstrip("01")) in heads:
            last = sizes["value"] if role in ("v_heads", "attended") else size
            value.shape = ir.Shape(["b", heads[role], "s", last])
        if role == "output":
            value.shape = ir.Shape(["b", "s", HEADS * sizes["value"]])
    return model


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
