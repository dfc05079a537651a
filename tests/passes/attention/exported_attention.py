"""Attention as the exporter writes it, in small graphs."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

HEADS, SIZE = 4, 16

MASK = """
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
WINDOW = """
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
  {MASK.format(window=WINDOW.format(window=window) if window else "seen = Identity(visible)")}
  {_SINKS if sinks else ""}
  {layers}
}}
"""
    model, values = parsed(text)
    heads = {"q_turned": HEADS, "k_turned": kv_heads, "v_heads": kv_heads, "attended": HEADS}
    for value in values:  # which shape inference doesn't find
        if (role := (value.name or "").rstrip("01")) in heads:
            last = sizes["value"] if role in ("v_heads", "attended") else size
            value.shape = ir.Shape(["b", heads[role], "s", last])
        if role == "output":
            value.shape = ir.Shape(["b", "s", HEADS * sizes["value"]])
    return model


def parsed(text: str) -> tuple[ir.Model, list[ir.Value]]:
    """Return a model in ONNX's text format, shapes inferred, and all its values.

    The format has no dots in names: two underscores stand for one.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.from_proto(proto)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        value.name = (value.name or "").replace("__", ".")
    return model, values
