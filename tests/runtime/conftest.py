"""A toy artifact with the I/O of a real one: causal attention with a cache, routed experts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from alloc_moe.runtime.artifact.plan import (
    MODEL_FILE,
    PLAN_FILE,
    PLAN_KEY,
    SHARED_CACHE_KEY,
    AllocationPlan,
    Budget,
    DialPoint,
    PlannedLayer,
)

VOCABULARY = 257  # the bytes, and one end-of-text token
EOS = 256
CONTEXT = 64
WIDTH, EXPERTS, ACTIVE, LAYERS = 8, 4, 2, 2

PLAN = AllocationPlan(
    source="nowhere/toy",
    budget=Budget(requested=0.5, activations=LAYERS * ACTIVE, original=LAYERS * EXPERTS),
    redistribution="none",
    weights="keep",
    layers=tuple(
        PlannedLayer(f"model.layers.{n}.mlp", EXPERTS, EXPERTS, ACTIVE) for n in range(LAYERS)
    ),
    sensitivity={"metric": "kl", "tokens": 1024, "calibration_sha256": "0" * 64, "seed": 0},
    verify={"max_abs_logit_error": 2e-6, "tokens": 32},
    versions={"alloc-moe": "0.1.0", "torch": "2.13.0"},
)

DIAL_PLAN = dataclasses.replace(
    PLAN,
    redistribution="price",
    layers=tuple(dataclasses.replace(la, sizes=(1.0,) * EXPERTS) for la in PLAN.layers),
    price=0.1,
    dial=(DialPoint(7.0, 0.05), DialPoint(4.0, 0.1), DialPoint(2.5, 0.4)),
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
  {%- if message.role not in ("system", "user", "assistant") %}
    {{- raise_exception("there is no role " ~ message.role) }}
  {%- endif %}
  {{- message.role[0] ~ ":" ~ message.content ~ "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}a:{% endif %}
"""


def _attention(n: int, *, shared: bool) -> str:
    """Attention of one head over the cache, which is copied, or shared and appended to in place."""
    if shared:
        return f"""
  mixed{n}, present__{n}__key, present__{n}__value = com.microsoft.GroupQueryAttention
    <num_heads=1, kv_num_heads=1, scale=1.0> (query{n}, key_flat{n}, value_flat{n},
     past_key_values__{n}__key, past_key_values__{n}__value, last_column, columns, , , , bias)
"""
    return f"""
  query4{n} = Unsqueeze(query{n}, axis1)
  key_new{n} = Unsqueeze(key_flat{n}, axis1)
  value_new{n} = Unsqueeze(value_flat{n}, axis1)
  key_now{n} = Cast<to=1>(past_key_values__{n}__key)
  value_now{n} = Cast<to=1>(past_key_values__{n}__value)
  key_all{n} = Concat<axis=2>(key_now{n}, key_new{n})
  value_all{n} = Concat<axis=2>(value_now{n}, value_new{n})
  present__{n}__key = Cast<to={{cache}}>(key_all{n})
  present__{n}__value = Cast<to={{cache}}>(value_all{n})
  key_t{n} = Transpose<perm=[0, 1, 3, 2]>(key_all{n})
  scores{n} = MatMul(query4{n}, key_t{n})
  biased{n} = Add(scores{n}, bias)
  attention{n} = Softmax<axis=-1>(biased{n})
  mixed4{n} = MatMul(attention{n}, value_all{n})
  mixed{n} = Squeeze(mixed4{n}, axis1)
"""


def _layer(n: int, *, dial: bool, shared: bool) -> str:
    """Attention, then experts chosen by a router, named as in an artifact."""
    reached = f"""
  share{n} = Softmax<axis=-1>(router{n})
  reached{n} = GreaterOrEqual(share{n}, alloc_moe__price)
  kept{n} = And(best_kept{n}, reached{n})
"""
    return f"""
  query{n} = MatMul(hidden{n}, wq{n})
  key_flat{n} = MatMul(hidden{n}, wk{n})
  value_flat{n} = MatMul(hidden{n}, wv{n})
  {_attention(n, shared=shared)}
  after{n} = Add(hidden{n}, mixed{n})
  rows{n} = Reshape(after{n}, rows_shape)
  router{n} = MatMul(rows{n}, wr{n})
  best{n}, best_ids{n} = TopK<axis=-1>(router{n}, active)
  last{n} = ReduceMin<keepdims=1>(best{n}, axis1)
  {"best_kept" if dial else "kept"}{n} = GreaterOrEqual(router{n}, last{n})
  {reached if dial else ""}
  log_weight{n} = LogSoftmax<axis=-1>(router{n})
  alloc_moe__router_probs__{n} = Where(kept{n}, log_weight{n}, dropped)
  weight{n} = Exp(alloc_moe__router_probs__{n})
  routed{n} = MatMul(weight{n}, experts{n})
  shape{n} = Shape(after{n})
  routed3{n} = Reshape(routed{n}, shape{n})
  hidden{n + 1} = Add(after{n}, routed3{n})
"""


def toy_text(*, position_input: bool, cache: str, dial: bool, shared: bool, keeps: bool) -> str:
    """Return the toy graph as ONNX text.

    ``cache`` is the element type of its cache. With ``dial`` experts whose share is below the
    price don't run. With ``shared`` the cache is appended to in place. With ``keeps`` it can be
    told how many logits are wanted.
    """
    slots = [f"{n}__{kind}" for n in range(LAYERS) for kind in ("key", "value")]
    shape = f"[batch, 1, {{}}, {WIDTH}]"
    past = "".join(f", {cache}{shape.format('past_sequence')} past_key_values__{s}" for s in slots)
    present = "".join(f", {cache}{shape.format('total_sequence')} present__{s}" for s in slots)
    type_number = {"float": 1, "float16": 10, "bfloat16": 16}[cache]
    positions = """
  counted = CumSum(attention_mask, axis1_scalar)
  from_zero = Sub(counted, one)
  all_positions = Max(from_zero, zero)
  position_ids = Slice(all_positions, past, total, axis1)
"""
    layers = "".join(_layer(n, dial=dial, shared=shared) for n in range(LAYERS))
    layers = layers.replace("{cache}", str(type_number))
    price = ", float alloc_moe__price" if dial else ""
    keep = ", int64[1] alloc_moe__logits_to_keep" if keeps else ""
    kept = """
  first = Neg(alloc_moe__logits_to_keep)
  wanted = Slice(hidden_last, first, sequence_end, axis1)
"""
    return f"""
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
toy (int64[batch, sequence] input_ids, int64[batch, total_sequence] attention_mask
     {", int64[batch, sequence] position_ids" if position_input else ""}{past}{price}{keep})
 => (float[batch, sequence, {VOCABULARY}] logits{present})
{{
  total = Shape<start=1>(attention_mask)
  sequence = Shape<start=1>(input_ids)
  past = Sub(total, sequence)
  {"" if position_input else positions}
  position = Gather(position_table, position_ids)
  token = Gather(embedding, input_ids)
  hidden0 = Add(token, position)
  total_scalar = Squeeze(total)
  past_scalar = Squeeze(past)
  key_index = Range(zero, total_scalar, one)
  query_index = Range(past_scalar, total_scalar, one)
  query_column = Unsqueeze(query_index, axis1)
  causal = LessOrEqual(key_index, query_column)
  is_real = Cast<to=9>(attention_mask)
  is_real4 = Unsqueeze(is_real, axes12)
  visible = And(is_real4, causal)
  bias = Where(visible, zero_float, masked)
  columns64 = Cast<to=6>(total)
  columns = Squeeze(columns64)
  before_last = Sub(total, one1)
  last64 = Cast<to=6>(before_last)
  batch_of_call = Shape<end=1>(input_ids)
  last_column = Expand(last64, batch_of_call)
  {layers}
  hidden_last = Identity(hidden{LAYERS})
  {kept if keeps else "wanted = Identity(hidden_last)"}
  logits = MatMul(wanted, head)
}}
"""


def toy_weights() -> dict[str, np.ndarray]:
    """Return the toy's weights: random but fixed, large enough that every token matters."""
    random = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    arrays = {
        "embedding": normal(VOCABULARY, WIDTH),
        "position_table": normal(2 * CONTEXT, WIDTH),
        "head": normal(WIDTH, VOCABULARY),
        "axis1": np.array([1]),
        "axes12": np.array([1, 2]),
        "axis1_scalar": np.array(1),
        "zero": np.array(0),
        "one": np.array(1),
        "one1": np.array([1]),
        "sequence_end": np.array([2**62]),
        "alloc_moe__logits_to_keep": np.array([0]),
        "active": np.array([ACTIVE]),
        "rows_shape": np.array([-1, WIDTH]),
        "zero_float": np.array(0, np.float32),
        "masked": np.array(-1e9, np.float32),
        "dropped": np.array(-1e4, np.float32),
        "alloc_moe__price": np.array(DIAL_PLAN.price, np.float32),
    }
    for n in range(LAYERS):
        arrays |= {f"w{kind}{n}": normal(WIDTH, WIDTH) / 2 for kind in "qkv"}
        arrays |= {f"wr{n}": normal(WIDTH, EXPERTS), f"experts{n}": normal(EXPERTS, WIDTH)}
    return arrays


def write_toy(
    path: Path,
    *,
    position_input: bool = True,
    cache: str = "float",
    plan: str | None = None,
    dial: bool = False,
    shared: bool = False,
    keeps: bool = False,
) -> Path:
    """Write the toy artifact, its weights in ``<path>.data``, and return its path."""
    text = toy_text(
        position_input=position_input, cache=cache, dial=dial, shared=shared, keeps=keeps
    )
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in toy_weights().items()
        if name in used
    )
    model = ir.from_proto(proto)
    for value in _values(model.graph):
        value.name = (value.name or "").replace("__", ".")  # the text format has no dots in names
    own = DIAL_PLAN if dial else PLAN
    model.metadata_props[PLAN_KEY] = own.to_json() if plan is None else plan
    if shared:
        model.metadata_props[SHARED_CACHE_KEY] = "float32"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=64)
    return path


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges: the ids are the bytes of the text."""
    alphabet = _bytes_to_unicode()
    vocabulary = {character: byte for byte, character in alphabet.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def _bytes_to_unicode() -> dict[int, str]:
    """Return GPT-2's printable character of every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


@pytest.fixture(scope="session")
def sizes() -> SimpleNamespace:
    """The toy's sizes, for tests to compare with."""
    return SimpleNamespace(
        vocabulary=VOCABULARY,
        width=WIDTH,
        experts=EXPERTS,
        active=ACTIVE,
        layers=LAYERS,
        eos=EOS,
        context=CONTEXT,
    )


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Path]:
    """`write_toy`, for tests that need a variant."""
    return write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare artifact, out.onnx, with position ids as an input."""
    return write_toy(tmp_path_factory.mktemp("toy") / "out.onnx")


@pytest.fixture(scope="session")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact, with a cache that is appended to in place."""
    return write_toy(tmp_path_factory.mktemp("toy") / "out.onnx", shared=True, keeps=True)


@pytest.fixture(scope="session")
def toy_without_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact, computing position ids from the attention mask."""
    return write_toy(tmp_path_factory.mktemp("toy") / "out.onnx", position_input=False)


def _write_bundle(folder: Path, plan: AllocationPlan, **toy: bool) -> Path:
    write_toy(folder / MODEL_FILE, **toy)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / PLAN_FILE).write_text(plan.to_json())
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle folder of the toy."""
    return _write_bundle(tmp_path_factory.mktemp("bundle"), PLAN)


@pytest.fixture(scope="session")
def dial_plan() -> AllocationPlan:
    """The plan of `dial_bundle`."""
    return DIAL_PLAN


@pytest.fixture(scope="session")
def dial_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a toy whose price can be set."""
    return _write_bundle(tmp_path_factory.mktemp("dial"), DIAL_PLAN, dial=True)


@pytest.fixture(scope="session")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the toy with a dial, one cache for all rows and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    _write_bundle(folder, DIAL_PLAN, dial=True, shared=True, keeps=True)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def plan() -> AllocationPlan:
    """The toy's plan."""
    return dataclasses.replace(PLAN)
