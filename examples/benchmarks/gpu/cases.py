"""The models that are measured and those that are checked: settings, types, plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model of random weights under one or more plans.

    ``settings`` are those of its configuration. ``plans`` are file name suffixes: ``price``, which
    has a dial and is the artifact proper; ``batch``, a pool at half; and plain top-k routing,
    ``full``, ``half``, ``quarter``.
    """

    name: str
    settings: dict[str, Any]
    dtype: str = "float16"
    plans: tuple[str, ...] = ("price",)

    @property
    def is_small(self) -> bool:
        """Whether the CPU can run it for comparison."""
        return self.name.startswith("small")


_COMMON: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

OLMOE: dict[str, Any] = {
    **_COMMON,
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
}

# The context is shorter than the real one, for the sake of the tables of its rotary embeddings.
DEEPSEEK: dict[str, Any] = {
    **_COMMON,
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
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
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
}

_SMALL: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

SMALL_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {
        **_SMALL,
        "model_type": "olmoe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "qwen3_moe": {
        **_SMALL,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "mixtral": {
        **_SMALL,
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": {
        **_SMALL,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 128,
        "intermediate_size": 384,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": 32,
    },
}

_PLAIN = ("full", "half", "quarter")
LARGE = (
    Case("olmoe", OLMOE, "float16", ("price", *_PLAIN)),
    Case("olmoe-int4", OLMOE, "int4", ("price", "full", "half")),
    Case("deepseek", DEEPSEEK, "float16", ("price", "full", "half")),
    Case("deepseek-int4", DEEPSEEK, "int4", ("price", "full", "half")),
)
SMALL = (
    *(
        Case(f"small-{family}-{dtype}", settings, dtype, ("price",))
        for family, settings in SMALL_FAMILIES.items()
        for dtype in ("float16", "float32")
    ),
    Case("small-olmoe-float16-pools", SMALL_FAMILIES["olmoe"], "float16", ("batch", "half")),
    *(
        Case(f"small-olmoe-{dtype}", SMALL_FAMILIES["olmoe"], dtype, ("price",))
        for dtype in ("bfloat16", "int8", "int4")
    ),
    *(
        Case(f"small-deepseek_v2-{dtype}", SMALL_FAMILIES["deepseek_v2"], dtype, ("price",))
        for dtype in ("int8", "int4")
    ),
)


def tiny(case: Case) -> Case:
    """Return the case with a model that any CPU runs at once, to try the script out."""
    if case.is_small:
        sizes = {"num_hidden_layers": 2}
    else:
        experts = "num_experts" if "num_experts" in case.settings else "n_routed_experts"
        sizes = {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "vocab_size": 512,
            experts: 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
        }
        if "kv_lora_rank" in case.settings:
            sizes |= {"moe_intermediate_size": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 64}
            sizes |= {"qk_rope_head_dim": 32, "v_head_dim": 64}
    return Case(case.name, {**case.settings, **sizes}, case.dtype, case.plans)
