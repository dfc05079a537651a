"""Write a small random checkpoint of a supported family, for tests and for trying things out.

    python examples/checkpoints/small.py deepseek_v2 deepseek/

The weights are random: what such a model says means nothing, but it has what its family has.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_SHARED: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe",
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    # A shared expert, a dense layer among the sparse ones, tied embeddings.
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    # A router that renormalises its top-k weights.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    # A first dense layer, latent attention, shared experts, group-limited routing, scaled weights.
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
    },
}


def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes with an end and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>"
    )


def save_checkpoint(folder: Path, settings: dict[str, Any], *, seed: int = 0) -> Path:
    """Write a random checkpoint, its routers decisive enough to compare runs token by token."""
    merged = {**_SHARED, **settings}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**merged), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if ".gate.weight" in name else 0.08)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = "the experts of a layer are chosen by its router; few of them are enough. " * 40
    (folder / "calibration.txt").write_text(text, "utf-8")
    return folder


if __name__ == "__main__":
    save_checkpoint(Path(sys.argv[2]), FAMILIES[sys.argv[1]])
