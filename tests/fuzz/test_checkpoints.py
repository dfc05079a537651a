"""Random damage to checkpoints ends in an AllocMoeError or in nothing at all.

A few cases by default; ALLOC_MOE_FUZZ=2000 tries as many of each kind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from alloc_moe.compiler.errors import AllocMoeError, CheckpointError
from alloc_moe.compiler.model.checkpoint import open_checkpoint
from alloc_moe.compiler.model.files.headers import read_header
from alloc_moe.compiler.model.loading import load_model

CASES = int(os.environ.get("ALLOC_MOE_FUZZ", "0"))
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def cases(default: int) -> settings:
    """Return settings for so many cases; each may take a minute at most."""
    return settings(
        max_examples=CASES or default,
        deadline=60_000,
        suppress_health_check=SHARED,
        database=None,
        derandomize=not CASES,
    )


NUMBERS = st.one_of(
    st.integers(-3, 10),
    st.sampled_from([1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**30, -(1 << 63)]),
    st.floats(allow_nan=True),
    st.booleans(),
)
VALUES = st.recursive(
    NUMBERS | st.text(max_size=8) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
SIDES = st.lists(st.integers(0, 5), max_size=3)
TYPES = st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "I64", "F4", "F6_E2M3", "C64", "X", 3])


@st.composite
def headers(draw: Callable[[Any], Any]) -> bytes:
    """Return a header whose entries are nearly right: places one after another, then damage."""
    entries: dict[str, Any] = {}
    end = 0
    for index in range(draw(st.integers(0, 4))):
        dtype, shape = draw(TYPES), draw(SIDES)
        size = {"F32": 4, "BF16": 2, "I64": 8, "C64": 8}.get(dtype, 1) * math.prod(shape)
        entries[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if entries and draw(st.booleans()):
        entry = entries[draw(st.sampled_from(sorted(entries)))]
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(VALUES)
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.just({"format": "pt"}) | VALUES)
    text = json.dumps(entries).encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    length = draw(st.sampled_from([len(text)] * 8 + [0, len(text) + 1, 1 << 40, (1 << 64) - 1]))
    data = bytes(max(end + draw(st.sampled_from([0] * 6 + [-1, 1, 8])), 0))
    return length.to_bytes(8, "little") + text + data


@cases(150)
@given(content=headers() | st.binary(max_size=40))
def test_any_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(str(path), framework="pt") as shard:
            theirs = {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:  # types that only later versions know
        pytest.fail(f"accepted what the library refuses: {error}")
    assert {key: tensor.shape for key, tensor in ours.items()} == theirs


@pytest.fixture(scope="session")
def damaged(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that each case writes a part of anew; a dense layer between two with experts."""
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    few = {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2}
    return Path(shutil.copytree(checkpoint("qwen2_moe", **few), folder))


@pytest.fixture
def _no_draws_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no weights on the meta device: they have no values, and drawing is slow there."""
    draw = torch.Tensor.normal_

    def normal_(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else draw(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", normal_)


CONFIG_KEYS = [
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_experts", "num_experts_per_tok"),
    *("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_labels", "id2label"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "max_position_embeddings"),
    *("layer_types", "mlp_only_layers", "decoder_sparse_step", "rope_parameters", "rope_scaling"),
    *("rope_theta", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "architectures"),
    *("model_type", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("quantization_config", "text_config", "auto_map", "transformers_weights", "use_cache"),
    *("output_attentions", "per_layer_config", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "head_dim", "qkv_bias", "is_encoder_decoder", "bos_token_id"),
    *("eos_token_id", "pad_token_id", "transformers_version", "norm_topk_prob", "fusion_config"),
]


@cases(60)
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, min_size=1, max_size=3))
def test_any_configuration_is_refused_or_works(damaged: Path, changes: dict[str, Any]) -> None:
    file = damaged / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        refused = refusal(lambda: open_checkpoint(str(damaged)))
    finally:
        file.write_text(before)
    assert "fault of the compiler" not in refused


def refusal(call: Callable[[], object]) -> str:
    """Return what a call refuses with; nothing if it works."""
    try:
        call()
    except AllocMoeError as error:
        return str(error)
    return ""


DAMAGE = st.sampled_from(["drop", "rename", "transpose", "float8", "bytes", "cut", "empty", "add"])


@pytest.mark.usefixtures("_no_draws_for_nothing")
@cases(30)
@given(
    choice=st.integers(0, 999),
    damage=DAMAGE,
    prefix=st.text(max_size=6),
    mode=st.sampled_from(["never", "always"]),
)
def test_any_set_of_tensors_is_refused_or_works(
    damaged: Path, choice: int, damage: str, prefix: str, mode: Any
) -> None:
    file = damaged / "model.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    name = sorted(tensors)[choice % len(tensors)]
    tensor = tensors[name]
    match damage:
        case "drop":
            del tensors[name]
        case "rename":
            tensors[prefix + name] = tensors.pop(name)
        case "transpose":
            tensors[name] = tensor.transpose(0, -1).contiguous()
        case "float8":
            tensors[name] = tensor.to(torch.float8_e4m3fn)
        case "bytes":
            tensors[name] = tensor.to(torch.uint8)
        case "cut":
            tensors[name] = tensor[:-1].contiguous()
        case "empty":
            tensors[name] = tensor[:0]
        case _:
            tensors[name.replace("0", "7")] = tensor.clone()
    save_file(tensors, file)
    try:
        refused = refusal(lambda: load_model(str(damaged), offload=mode))
    finally:
        file.write_bytes(before)
    assert "fault of the compiler" not in refused
