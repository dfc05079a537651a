"""Write a random checkpoint as large as a real one: its configuration and layout, random weights.

    python examples/checkpoints/full_size.py OLMoE-1B-7B olmoe-1b-7b/
    python examples/checkpoints/full_size.py DeepSeek-V2-Lite deepseek/ --layers 4

Sizes, shapes and names of the tensors are those on the hub, in bfloat16 shards; what the model says
means nothing. One tensor at a time is in memory. For trying out how long a compile takes and what
memory it needs, without a download.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from small import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

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
}

_ROUTER_LOGITS = 2.0  # their standard deviation: some experts matter more than others


def write_checkpoint(
    folder: Path, settings: dict[str, Any], *, seed: int = 0, shard_bytes: int = 4 << 30
) -> None:
    """Write configuration, tokenizer, and weights in shards of about `shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**{**settings, **_TOKENS}, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    parameters = dict(model.named_parameters())
    shapes = [
        item for name in parameters for item in hub_tensors(name, list(parameters[name].shape))
    ]
    shards: list[list[tuple[str, list[int]]]] = [[]]
    size = 0
    for name, shape in shapes:
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * math.prod(shape)
    weight_map: dict[str, str] = {}
    random = torch.Generator().manual_seed(seed)
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= {name: file for name, _ in tensors}
        _write_shard(folder / file, tensors, random)
        print(f"Wrote {file}")
    total = 2 * sum(math.prod(shape) for _, shape in shapes)
    index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_data), "utf-8")


def hub_tensors(name: str, shape: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the tensors that a parameter is made of on the hub: there every expert has its own."""
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if fused is None:
        yield name, shape
        return
    experts, rows, columns = shape
    for expert in range(experts):
        if fused[2] == "down_proj":
            yield f"{fused[1]}.{expert}.down_proj.weight", [rows, columns]
        else:
            yield f"{fused[1]}.{expert}.gate_proj.weight", [rows // 2, columns]
            yield f"{fused[1]}.{expert}.up_proj.weight", [rows // 2, columns]


def _write_shard(path: Path, tensors: list[tuple[str, list[int]]], random: torch.Generator) -> None:
    """Write a safetensors file: the length of its header, the header, the tensors in a row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            values = _random(name, shape, random).to(torch.bfloat16)
            file.write(values.view(torch.uint16).numpy().data)


def _random(name: str, shape: list[int], random: torch.Generator) -> torch.Tensor:
    """Return weights that keep the size of what goes through them, and routers that choose."""
    values = torch.randn(shape, generator=random)
    if len(shape) == 1:
        norm = "norm" in name
        return values.mul_(0.1).add_(1.0 if norm else 0.0)
    if "embed_tokens" in name:
        return values
    return values.mul_((_ROUTER_LOGITS if ".gate.weight" in name else 1.0) / math.sqrt(shape[1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="write only the first of its decoder layers")
    arguments = parser.parse_args()
    chosen = dict(MODELS[arguments.name])
    if arguments.layers:
        chosen["num_hidden_layers"] = min(arguments.layers, chosen["num_hidden_layers"])
    write_checkpoint(arguments.folder, chosen)
