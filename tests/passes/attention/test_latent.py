"""Latent attention on one cache that is appended to in place, against the exported one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from alloc_moe.passes.attention.latent import LatentAttentionPass, latent_caches

Run = Callable[..., Any]
Build = Callable[..., ir.Model]

HEADS, OWN, TURNED, RANK, VALUE = 2, 8, 4, 6, 5

_PAIRS = """
  even_{x} = Slice({x}, from0, ends, axis3, steps)
  odd_{x} = Slice({x}, axis1, ends, axis3, steps)
  a_{x} = Mul(even_{x}, cosine4)
  b_{x} = Mul(odd_{x}, sine4)
  c_{x} = Mul(odd_{x}, cosine4)
  d_{x} = Mul(even_{x}, sine4)
  first_{x} = Sub(a_{x}, b_{x})
  second_{x} = Add(c_{x}, d_{x})
  turned_{x} = Concat<axis=-1>(first_{x}, second_{x})
"""
_QUERY = """
  query{n} = Concat<axis=-1>({own}, {turned})
"""
_SCALED_QUERY = """
  joined{n} = Concat<axis=-1>({own}, {turned})
  query{n} = Mul(joined{n}, factor)
"""
_LAYER = """
  present__{n}__key = Concat<axis=-2>(past_key_values__{n}__key, latent)
  present__{n}__value = Concat<axis=-2>(past_key_values__{n}__value, {shared})
  by_column{n} = Transpose<perm=[1, 0]>(expansion)
  made{n} = MatMul(present__{n}__key, by_column{n})
  split{n} = Reshape(made{n}, split_heads)
  heads{n} = Transpose<perm=[0, 2, 1, 3]>(split{n})
  keys{n}, values{n} = Split<axis=3>(heads{n}, sizes)
  shape{n} = Concat<axis=0>(batch, heads_, total, turned_)
  shared{n} = Expand(present__{n}__value, shape{n})
  all_keys{n} = Concat<axis=-1>(keys{n}, shared{n})
  attended{n} = Attention<scale=0.3, softcap={softcap}>(query{n}, all_keys{n}, values{n}, mask)
  some{n} = Where(blind, zeros, attended{n})
  rows{n} = Transpose<perm=[0, 2, 1, 3]>(some{n})
  output{n} = Reshape(rows{n}, merge_heads)
"""


@pytest.fixture
def latent_attention(exported_attention: ModuleType) -> Build:
    """Return a function that makes two layers as they are exported."""
    return functools.partial(build, exported_attention)


def build(
    exported: ModuleType,
    *,
    rotated: bool = True,
    softcap: float = 0.0,
    window: str = "",
    factor: str = "",
) -> ir.Model:
    """Return two layers as they are exported, with the mask of other attention."""
    x, y = ("turned_x", "turned_y") if rotated else ("x", "y")
    pairs = "".join(_PAIRS.format(x=name) for name in "xy") if rotated else ""
    seen = "seen = Identity(visible)"
    if window:
        seen = exported.WINDOW.format(window=window)
    layer = (_SCALED_QUERY if factor else _QUERY) + _LAYER
    layers = "".join(
        layer.format(n=n, own="own", turned=x, shared=y, softcap=softcap) for n in range(2)
    )
    slots = [(n, kind, size) for n in range(2) for kind, size in (("key", RANK), ("value", TURNED))]
    past = ", ".join(
        f"float[b, 1, past, {size}] past_key_values__{n}__{kind}" for n, kind, size in slots
    )
    present = ", ".join(f"float[b, 1, all, {size}] present__{n}__{kind}" for n, kind, size in slots)
    weight = np.random.default_rng(1).normal(size=HEADS * (OWN + VALUE) * RANK)
    numbers = ", ".join(map(str, weight.astype(np.float32).tolist()))
    outputs = ", ".join(f"float[b, s, {HEADS * VALUE}] output{n}" for n in range(2))
    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
g (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, {HEADS}, s, {OWN}] own,
   float[b, {HEADS}, s, {TURNED}] x, float[b, 1, s, {TURNED}] y, float[b, 1, s, {RANK}] latent,
   float[b, s, {TURNED // 2}] cosine, float[b, s, {TURNED // 2}] sine,
   float[{factor or "b, 1, s, 1"}] factor, {past})
 => ({outputs}, {present})
<int64 zero = {{0}}, int64 one = {{1}}, int64[1] from0 = {{0}}, int64[1] axis1 = {{1}},
 int64[2] axes12 = {{1, 2}}, int64[1] axis_last = {{-1}}, float least = {{-3.4e38}},
 float half = {{0.5}}, float zeros = {{0}}, int64 two = {{2}}, int64[1] axis3 = {{3}},
 int64[1] steps = {{2}}, int64[1] ends = {{9223372036854775807}},
 float[{HEADS * (OWN + VALUE)}, {RANK}] expansion = {{{numbers}}},
 int64[4] split_heads = {{0, -1, {HEADS}, {OWN + VALUE}}}, int64[2] sizes = {{{OWN}, {VALUE}}},
 int64[1] heads_ = {{{HEADS}}}, int64[1] turned_ = {{{TURNED}}},
 int64[3] merge_heads = {{0, 0, -1}}>
{{
  {exported.MASK.format(window=seen)}
  cosine4 = Unsqueeze(cosine, axis1)
  sine4 = Unsqueeze(sine, axis1)
  {pairs}
  {layers}
}}
"""
    model, values = exported.parsed(text)
    for value in values:
        if (value.name or "").rstrip("01") == "values":
            value.shape = ir.Shape(["b", HEADS, "t", VALUE])
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


def call(rng: np.random.Generator, mask: list[list[int]], *, past: int) -> dict[str, NDArray[Any]]:
    """Return inputs for a mask [batch, past + sequence]."""
    batch, sequence = len(mask), len(mask[0]) - past

    def floats(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    angles = floats(batch, sequence, TURNED // 2)
    given = {
        "input_ids": np.zeros((batch, sequence), np.int64),
        "attention_mask": np.array(mask),
        "own": floats(batch, HEADS, sequence, OWN),
        "x": floats(batch, HEADS, sequence, TURNED),
        "y": floats(batch, 1, sequence, TURNED),
        "latent": floats(batch, 1, sequence, RANK),
        "cosine": np.cos(angles),
        "sine": np.sin(angles),
        "factor": floats(batch, 1, sequence, 1),
    }
    for n in range(2):
        given[f"past_key_values.{n}.key"] = floats(batch, 1, past, RANK)
        given[f"past_key_values.{n}.value"] = floats(batch, 1, past, TURNED)
    return given


def in_place(given: dict[str, NDArray[Any]], *, room: int = 0) -> dict[str, NDArray[Any]]:
    """Return inputs whose caches have room for the new tokens and `room` more."""
    space = given["input_ids"].shape[1] + room
    caches = {}
    # What is rotated is of another order there: first and second of each pair together.
    order = np.arange(TURNED).reshape(2, -1).T.reshape(-1)
    for n in range(2):
        key, value = (given[f"past_key_values.{n}.{kind}"] for kind in ("key", "value"))
        rows = np.concatenate([key, value[..., order]], axis=-1)
        for kind, filled, axis in (("key", rows, 2), ("value", key.swapaxes(2, 3), 3)):
            pads = [(0, space if at == axis else 0) for at in range(4)]
            caches[f"past_key_values.{n}.{kind}"] = np.pad(filled, pads, constant_values=7)
    return {**given, **caches}


PREFILL = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
CALLS = {
    "prefill": (PREFILL, 0),
    "one token": ([[1]], 0),
    "continuation": ([[0, 1, 1, 1, 1, 1]], 3),
    "decode": (PREFILL, 4),
    "several sequences by several tokens": (PREFILL, 2),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("room", "factor"), [(0, ""), (3, ""), (3, "b, 1, s, 1")])
def test_real_tokens_get_what_they_got(
    latent_attention: Build, run: Run, rng: np.random.Generator, name: str, room: int, factor: str
) -> None:
    mask, past = CALLS[name]
    model, inputs = latent_attention(factor=factor), call(rng, mask, past=past)
    before = run(model, inputs)
    assert LatentAttentionPass()(model).modified
    after = run(model, in_place(inputs, room=room))
    real = np.array(mask)[:, past:] > 0
    for old, new in zip(before[:2], after[:2], strict=True):
        np.testing.assert_allclose(new[real], old[real], rtol=2e-5, atol=2e-6)
        assert np.isfinite(new).all()
    for n in range(2):
        latents, (rows, columns) = before[2 + 2 * n], after[2 + 2 * n : 4 + 2 * n]
        total = len(mask[0])
        np.testing.assert_array_equal(rows[:, :, :total, :RANK], latents)
        np.testing.assert_array_equal(columns[..., :total], latents.swapaxes(2, 3))
        assert (rows[:, :, total:] == 7).all()
        assert (columns[..., total:] == 7).all()


@pytest.mark.parametrize(("kind", "at"), [("key", (1, 0, 2, 3)), ("value", (1, 0, 3, 2))])
def test_another_latent_makes_a_difference(
    latent_attention: Build, run: Run, rng: np.random.Generator, kind: str, at: tuple[int, ...]
) -> None:
    model, inputs = latent_attention(), in_place(call(rng, PREFILL, past=4))
    LatentAttentionPass()(model)
    before = run(model, inputs)[1]
    inputs[f"past_key_values.1.{kind}"][at] += 0.1
    assert np.abs(run(model, inputs)[1] - before).max() > 1e-4


def test_a_cache_without_room_is_no_silent_mistake(
    latent_attention: Build, run: Run, rng: np.random.Generator
) -> None:
    model, inputs = latent_attention(), in_place(call(rng, PREFILL, past=4))
    LatentAttentionPass()(model)
    for n in range(2):
        for kind, part in (("key", np.s_[:, :, :4]), ("value", np.s_[..., :4])):
            inputs[f"past_key_values.{n}.{kind}"] = inputs[f"past_key_values.{n}.{kind}"][part]
    with pytest.raises(Exception, match=r"ScatterND|Pad"):
        run(model, inputs)


def test_the_graph_has_caches_of_latents_and_no_keys_or_values(latent_attention: Build) -> None:
    model = latent_attention()
    LatentAttentionPass()(model)
    slots = [v for v in model.graph.inputs if (v.name or "").startswith("past_key_values.")]
    rows, columns = ["b", 1, "past", RANK + TURNED], ["b", 1, RANK, "past"]
    assert {value.name: [str(size) for size in value.shape or ()] for value in slots} == {
        f"past_key_values.{n}.{kind}": [str(size) for size in shape]
        for n in range(2)
        for kind, shape in (("key", rows), ("value", columns))
    }
    names = [value.name for value in model.graph.outputs]
    assert names[2:] == [f"present.{n}.{kind}" for n in range(2) for kind in ("key", "value")]
    assert len(list(latent_caches(model))) == 2 * 2
    found = [node.op_type for node in model.graph]
    assert "Attention" not in found
    assert found.count("RotaryEmbedding") == 2  # both layers rotate the same here
    shapes = {v.name: v.shape for v in model.graph.initializers.values()}
    assert shapes["expansion.keys"] == (HEADS, OWN, RANK)
    assert shapes["expansion.values"] == (HEADS, RANK, VALUE)


def test_what_is_rotated_otherwise_stays_as_it_is(
    latent_attention: Build, run: Run, rng: np.random.Generator
) -> None:
    model, inputs = latent_attention(rotated=False), call(rng, PREFILL, past=0)
    before = run(model, inputs)
    assert LatentAttentionPass()(model).modified
    assert "RotaryEmbedding" not in [node.op_type for node in model.graph]
    real = np.array(PREFILL) > 0
    after = run(model, in_place(inputs))
    np.testing.assert_allclose(after[1][real], before[1][real], rtol=2e-5, atol=2e-6)


def test_a_second_run_changes_nothing(latent_attention: Build) -> None:
    model = latent_attention()
    LatentAttentionPass()(model)
    assert not LatentAttentionPass()(model).modified


@pytest.mark.parametrize(
    "features", [{"softcap": 30.0}, {"window": "two"}, {"factor": "b, 2, s, 1"}], ids=str
)
def test_what_it_does_not_know_is_left_alone(
    latent_attention: Build, features: dict[str, Any]
) -> None:
    model = latent_attention(**features)
    assert not LatentAttentionPass()(model).modified


def test_ordinary_attention_is_left_alone(exported_attention: ModuleType) -> None:
    assert not LatentAttentionPass()(exported_attention.attention()).modified


def test_another_reader_of_the_cache_is_reported(latent_attention: Build) -> None:
    model = latent_attention()
    LatentAttentionPass()(model)
    cache = next(latent_caches(model))
    model.graph.append(ir.node("Neg", [cache.inputs[0]], name="other"))
    with pytest.raises(ir.passes.PostconditionError, match=r"past_key_values.0.key is read by"):
        LatentAttentionPass().ensures(model)
