"""Write a random checkpoint as large as a real one: its configuration and layout, random weights.

    python examples/checkpoints/full_size.py OLMoE-1B-7B olmoe-1b-7b/
    python examples/checkpoints/full_size.py DeepSeek-V2-Lite deepseek/ --layers 4

Sizes, shapes and names of the tensors are those on the hub, in shards of bfloat16, gpt-oss' experts
in MXFP4; what the model says means nothing. Of a model that sees, only the text part is written.
One tensor at a time is in memory. For trying out how long a compile takes and what memory it needs,
without a download.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from small import ROUTERS, byte_tokenizer
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

_TOKENS: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}

MODELS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "vocab_size": 248320,
            "hidden_size": 2048,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
            },
            "tie_word_embeddings": False,
        },
    },
}

_ROUTER_LOGITS = 2.0  # their standard deviation: some experts matter more than others

_MXFP4_VALUES = 2.93  # the root mean square of what four bits stand for there
_MXFP4_BIAS = 127  # of the exponents that scales are
_MXFP4_BLOCK = 32


class Stored(NamedTuple):
    """A tensor as a safetensors file has it, ``BF16`` or ``U8``; ``mean`` is that of a vector."""

    name: str
    shape: list[int]
    dtype: str = "BF16"
    mean: float = 0.0

    @property
    def bytes(self) -> int:
        """How many its values take."""
        return math.prod(self.shape) * (1 if self.dtype == "U8" else 2)


def write_checkpoint(
    folder: Path, settings: dict[str, Any], *, seed: int = 0, shard_bytes: int = 4 << 30
) -> None:
    """Write configuration, tokenizer, and weights in shards of about `shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**with_text(settings, _TOKENS), dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    config.architectures = [_architecture(config, model)]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    layout, means = _layout(settings), _norms(model)
    shards: list[list[Stored]] = [[]]
    for name, parameter in model.named_parameters():
        for tensor in hub_tensors(name, list(parameter.shape), layout):
            if sum(stored.bytes for stored in shards[-1]) >= shard_bytes:
                shards.append([])
            shards[-1].append(tensor._replace(mean=means.get(name, 0.0)))
    weight_map: dict[str, str] = {}
    random = torch.Generator().manual_seed(seed)
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: file for tensor in tensors}
        _write_shard(folder / file, tensors, random)
        print(f"Wrote {file}")
    total = sum(tensor.bytes for tensors in shards for tensor in tensors)
    index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_data), "utf-8")


def with_text(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of the language model changed, which may stand inside."""
    if "text_config" not in settings:
        return {**settings, **changes}
    return {**settings, "text_config": {**settings["text_config"], **changes}}


def _architecture(config: Any, model: Any) -> str:
    if "text_config" not in config.sub_configs:
        return type(model).__name__
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__


def _norms(model: torch.nn.Module) -> dict[str, float]:
    """Return what weights of norms begin with: some add one to theirs."""
    norms = ((name, module) for name, module in model.named_modules() if name.endswith("norm"))
    return {f"{name}.weight": type(module)(1).weight.item() for name, module in norms}


def _layout(settings: dict[str, Any]) -> str:
    if "quantization_config" in settings:
        return "mxfp4"
    return "fused" if "text_config" in settings else "single"


def hub_tensors(name: str, shape: list[int], layout: str = "single") -> Iterator[Stored]:
    """Yield the tensors that a parameter is made of on the hub.

    Of experts that is one each (``single``), all of a layer in one, below another prefix
    (``fused``), or their blocks and scales (``mxfp4``).
    """
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if layout == "fused":
        yield Stored(re.sub(r"^model\.", "model.language_model.", name), shape)
        return
    if fused is None:
        yield Stored(name, shape)
        return
    experts, rows, columns = shape
    if layout == "mxfp4":
        blocks = [experts, columns, rows // _MXFP4_BLOCK]  # transformers has them transposed
        yield Stored(f"{name}_blocks", [*blocks, _MXFP4_BLOCK // 2], "U8")
        yield Stored(f"{name}_scales", blocks, "U8")
        return
    for expert in range(experts):
        if fused[2] == "down_proj":
            yield Stored(f"{fused[1]}.{expert}.down_proj.weight", [rows, columns])
        else:
            yield Stored(f"{fused[1]}.{expert}.gate_proj.weight", [rows // 2, columns])
            yield Stored(f"{fused[1]}.{expert}.up_proj.weight", [rows // 2, columns])


def _write_shard(path: Path, tensors: list[Stored], random: torch.Generator) -> None:
    """Write a safetensors file: the length of its header, the header, the tensors in a row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_random(tensor, random).data)


def _random(tensor: Stored, random: torch.Generator) -> np.ndarray[Any, Any]:
    """Return weights that keep the size of what goes through them, and routers that choose."""
    name, shape = tensor.name, tensor.shape
    if name.endswith("_blocks"):
        return torch.randint(256, shape, generator=random, dtype=torch.uint8).numpy()
    if name.endswith("_scales"):
        inputs = shape[-1] * _MXFP4_BLOCK
        exponent = round(math.log2(1 / (_MXFP4_VALUES * math.sqrt(inputs))))
        return torch.full(shape, _MXFP4_BIAS + exponent, dtype=torch.uint8).numpy()
    values = torch.randn(shape, generator=random)
    if len(shape) == 1:
        values.mul_(0.1).add_(tensor.mean)
    elif "embed_tokens" not in name:
        values.mul_((_ROUTER_LOGITS if name.endswith(ROUTERS) else 1.0) / math.sqrt(shape[-1]))
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="write only the first of its decoder layers")
    arguments = parser.parse_args()
    chosen = MODELS[arguments.name]
    if arguments.layers:
        most = chosen.get("text_config", chosen)["num_hidden_layers"]
        chosen = with_text(chosen, {"num_hidden_layers": min(arguments.layers, most)})
    write_checkpoint(arguments.folder, chosen)
