r"""What 4 bits cost in llama.cpp's formats and in ours, of the same models, by bytes.

    pip install llama-cpp-python gguf
    python examples/benchmarks/quality/against_llama_cpp.py examples/tiny-moe \
        --text examples/tiny-moe/heldout.txt

A model is written as GGUF in float16, which llama.cpp must compute as transformers does, and
quantised by llama.cpp's own llama_model_quantize: as it does by itself, and with an importance
matrix, the mean squares of what each column is multiplied by on the text that ours are rounded on.
The quantised weights are then put into the model in PyTorch, as ours are. So all are scored by one
arithmetic, and only weights differ. The last column is what llama.cpp itself computes, which rounds
activations too.

A row of 128 or 64 columns is too short for the blocks of 256 that Q4_K and Q6_K have. The types
that llama.cpp takes in place of them are printed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import gguf
import llama_cpp
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from rounding import costs, rounded, said, windows_of

from alloc_moe.compiler.calibration.windows import calibrate
from alloc_moe.compiler.model.loading import load_model
from alloc_moe.compiler.model.moe_model import MoeModel
from alloc_moe.compiler.records import CalibrationOptions
from alloc_moe.compiler.rounding.weights import stored_formats
from alloc_moe.runtime.console import Console

ARCHITECTURES = {"olmoe": "olmoe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
_Q4_0, _Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
FORMATS: Mapping[str, Mapping[str, int]] = {
    "Q4_0": {"ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0},
    "Q4_K_M": {"ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M},
    "Q4_0, head too, embeddings Q8_0": {
        "ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "output_tensor_type": _Q4_0,
        "token_embedding_type": _Q8_0,
    },
}
"""By name, what llama_model_quantize is asked for; the last is laid out as our int4."""

_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def theirs(name: str) -> str:
    """Return llama.cpp's name of a weight that isn't a layer's experts."""
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    _, _, layer, leaf = module.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[leaf]}.{kind}"


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights by llama.cpp's names, as views of the parameters."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        block = f"blk.{name.split('.')[2]}" if ".experts." in name else ""
        if name.endswith("mlp.experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            yield f"{block}.ffn_gate_exps.weight", gate
            yield f"{block}.ffn_up_exps.weight", up
        elif name.endswith("mlp.experts.down_proj"):
            yield f"{block}.ffn_down_exps.weight", weight
        else:  # llama.cpp has a gate of one row as a vector
            yield theirs(name), weight[0] if name.endswith("shared_expert_gate.weight") else weight


def write_gguf(moe: MoeModel, path: Path) -> None:
    """Write a model: matrices in float16, norms and routers in float32."""
    config: Any = moe.config
    expert_size = getattr(config, "moe_intermediate_size", config.intermediate_size)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(expert_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    for name, weight in tensors(moe.model):
        floats = weight.dim() == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, weight.to(torch.float32 if floats else torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Importance:
    """The mean squares of what enters each weight's columns, as llama.cpp's own tool takes them.

    Those of experts are [experts, columns], each over the tokens that it is sent, of others
    [columns].

    Args:
        moe: The model.
        ids: The text [windows, tokens].
    """

    def __init__(self, moe: MoeModel, ids: NDArray[np.int64]) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for name, module in moe.model.named_modules():
                found: Any = self._experts if name.endswith("mlp.experts") else self._linear
                if found == self._experts or isinstance(module, torch.nn.Linear):
                    hook = module.register_forward_pre_hook(functools.partial(found, name))
                    hooks.callback(hook.remove)
            for window in torch.from_numpy(ids):
                moe.model(input_ids=window[None])
        self._means = [(name.encode(), self._mean(name)) for name in self._sums]

    def entries(self) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
        """Return them as llama_model_quantize takes them: the last entry has no name.

        They are views: this object must live as long.
        """
        entries = (llama_cpp.llama_model_imatrix_data * (len(self._means) + 1))()
        for entry, (name, mean) in zip(entries, self._means, strict=False):
            entry.name, entry.size = name, mean.size
            entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return entries

    def _mean(self, name: str) -> NDArray[np.float32]:
        """Return the mean squares of a weight; ones for an expert that no token was sent to."""
        tokens = self._tokens[name]
        mean = torch.where(tokens > 0, self._sums[name] / tokens.clamp(min=1), 1.0)
        return np.ascontiguousarray(mean.numpy(), np.float32)

    def _linear(self, name: str, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0].flatten(0, -2)
        self._add(theirs(f"{name}.weight"), rows.square().sum(0), torch.tensor([len(rows)]))

    def _experts(self, name: str, module: Any, given: tuple[torch.Tensor, ...]) -> None:
        hidden, ids = given[:2]
        entering, inner, sent = [], [], []
        for expert, gate_up in enumerate(module.gate_up_proj):
            rows = hidden[(ids == expert).any(-1)]
            gate, up = (rows @ gate_up.mT).chunk(2, dim=-1)
            entering.append(rows.square().sum(0))
            inner.append((module.act_fn(gate) * up).square().sum(0))
            sent.append(len(rows))
        block, tokens = f"blk.{name.split('.')[2]}", torch.tensor(sent)[:, None]
        for kind, sums in (("gate", entering), ("up", entering), ("down", inner)):
            self._add(f"{block}.ffn_{kind}_exps.weight", torch.stack(sums), tokens)

    def _add(self, name: str, sums: torch.Tensor, tokens: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + sums
        self._tokens[name] = self._tokens.get(name, 0) + tokens


def quantize(
    source: Path, target: Path, options: Mapping[str, int], importance: Importance | None
) -> None:
    """Write a GGUF file in fewer bits by llama.cpp's own quantiser."""
    asked = llama_cpp.llama_model_quantize_default_params()
    for name, value in options.items():
        setattr(asked, name, int(value))
    asked.nthread = 1
    if importance is not None:
        asked.imatrix = importance.entries()
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), asked):
        raise RuntimeError(f"llama_model_quantize returned {code}")


def read_into(moe: MoeModel, path: Path) -> tuple[str, int]:
    """Give a model the weights of a GGUF file; return how many have which type, and all bytes."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in tensors(moe.model):
        values = dequantize(found[name].data, found[name].tensor_type)
        weight.copy_(torch.tensor(values).view_as(weight))
    kinds = collections.Counter(tensor.tensor_type.name for tensor in found.values())
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "F32")
    return types, sum(int(tensor.n_bytes) for tensor in found.values())


def said_by_llama_cpp(path: Path, windows: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the log-probabilities of what comes next [windows, window - 1, vocabulary]."""
    length = windows.shape[1]
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, options) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp can't load {path}; see its messages")
    found = []
    for window in windows.tolist():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        found.append(_logits(context, window, vocabulary)[:-1])
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(np.stack(found)).log_softmax(-1)


def _logits(context: Any, ids: list[int], vocabulary: int) -> NDArray[np.float32]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    code = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama_decode returned {code}")
    pointer = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(pointer, (len(ids), vocabulary)).copy()


def our_bytes(moe: MoeModel) -> int:
    """Return the bytes of a rounded model's weights: values, scales and what stays in float32."""
    formats = stored_formats(moe)
    bits = sum(
        parameter.numel() * (formats[name][0].bits_per_weight if name in formats else 32)
        for name, parameter in moe.model.named_parameters()
    )
    return int(bits) // 8


def files(moe: MoeModel, folder: Path, importance: Importance) -> Iterator[tuple[str, Path]]:
    """Yield by name GGUF files of a model in float16 and in each of the formats, in turn."""
    full, few = folder / "f16.gguf", folder / "few.gguf"
    write_gguf(moe, full)
    yield "F16", full
    for name, options in FORMATS.items():
        for seen in (None, importance):
            quantize(full, few, options, seen)
            yield f"{name}{' with importance' if seen else ''}", few


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", required=True, type=click.Path(path_type=Path))
@click.option("--text-tokens", default=8192, show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
@click.option("--rounding", "roundings", multiple=True, default=("nearest", "gptq"), help="Ours.")
@torch.inference_mode()
def main(
    models: tuple[str, ...], text: Path, text_tokens: int, tokens: int, roundings: tuple[str, ...]
) -> None:
    """Print what 4 bits add to the perplexity of MODELS, the divergence in nats, and bytes."""
    llama_cpp.llama_log_set(_DISCARD, None)
    llama_cpp.llama_backend_init()
    print("| model | weights | types | bytes | perplexity | KL | KL in llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        moe = load_model(model)
        windows = windows_of(moe, text, text_tokens)
        floats = said(moe, windows)
        drawn = calibrate(moe.checkpoint, CalibrationOptions(tokens=tokens), Console(quiet=True))
        importance = Importance(moe, drawn.all_ids)
        for rounding in roundings:
            ours = rounded(model, "int4", rounding, 128, drawn)
            cells = _cells(said(ours, windows), floats, windows)
            print(_row(model, f"int4, {rounding}", "ours", our_bytes(ours), *cells, ""), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, path in files(moe, Path(folder), importance):
                types, size = read_into(moe, path)
                cells = _cells(said(moe, windows), floats, windows)
                run = said_by_llama_cpp(path, windows, floats.shape[-1])
                cells += _cells(run, floats, windows)[1:]
                print(_row(model, name, types, size, *cells), flush=True)


def _cells(found: torch.Tensor, floats: torch.Tensor, windows: torch.Tensor) -> list[str]:
    """Return what is added to perplexity, and the divergence."""
    added, divergence = costs(found, floats, windows)
    return [f"{added:+.2%}", f"{divergence:.4f}"]


def _row(model: str, what: str, types: str, size: int, *cells: str) -> str:
    return f"| {' | '.join([Path(model).name, what, types, f'{size:,}', *cells])} |"


_DISCARD = llama_cpp.llama_log_callback(lambda level, text, data: None)


if __name__ == "__main__":
    main()
