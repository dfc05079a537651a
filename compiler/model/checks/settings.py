"""config.json against itself and against the headers of the weights, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from alloc_moe.compiler.errors import CheckpointError
from alloc_moe.compiler.model.files.json_files import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from alloc_moe.compiler.model.files.stored import StoredWeights

# transformers makes lists and dictionaries of these lengths while it reads the file.
# vision_feature_layer is an index, from the end if negative.
_COUNT = re.compile(r"(?:^|(?<!feature)_)(?:layers?|labels|experts|heads?|groups?|blocks)$")
# mscale_all_dim of YaRN's rotary embeddings is a factor.
_SIZE = re.compile(r"(?<!mscale_all)(?:_size|_dim|_rank|^d_model|^n_embd)$")
_MOST, _LARGEST = 20_000, 1 << 26
_LEAST_CONTEXT = 2
_NESTED = 4
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_TOGETHER = "Weights and config.json don't belong together."


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json asks for numbers of things that no model has."""
    for name, value in _numbers(settings, _NESTED):
        limit = _MOST if _COUNT.search(name) else _LARGEST if _SIZE.search(name) else None
        if limit is None:
            if abs(value) >= 1 << 63:
                raise CheckpointError(f"{name} in config.json is {shown(value)}, which is absurd.")
        elif not 0 <= value <= limit or value != int(value):
            raise CheckpointError(
                f"{name} in config.json is {shown(value)}, not a whole number between 0 and "
                f"{limit}. Take it from the original config.json."
            )
    for name in ("num_labels", "vocab_size", "hidden_size", *_LAYERS):
        given = settings.get(name)
        if isinstance(given, str | list | dict) or given is True or given == 0:
            raise CheckpointError(
                f"{name} in config.json is {shown(given)}, not a positive whole number. Take it "
                "from the original config.json."
            )


def _numbers(settings: Mapping[str, Any], depth: int) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and depth:
            yield from _numbers(value, depth - 1)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value


def check_number_of_layers(settings: Mapping[str, Any], weights: StoredWeights) -> None:
    """Raise CheckpointError if config.json asks for more decoder layers than there are weights."""
    nested = settings.get("text_config")
    parts = [nested] if isinstance(nested, Mapping) else [settings]
    found = 1 + max((int(m[1]) for name in weights if (m := _LAYER.search(name))), default=-1)
    for name, value in ((name, part.get(name)) for part in parts for name in _LAYERS):
        if found and isinstance(value, int) and value > found:
            raise CheckpointError(
                f"{name} in config.json is {value}, but the weights in {weights.files.folder} hold "
                f"{found} layers. {_TOGETHER} Is the checkpoint complete?"
            )


def check_architecture(config: PreTrainedConfig, weights: StoredWeights) -> None:
    """Raise CheckpointError if sizes contradict each other, or the shapes of the weights."""
    text = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(text, name, 1)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} in config.json is {shown(value)}; it must be positive.")
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < _LEAST_CONTEXT:
        raise CheckpointError(
            f"max_position_embeddings in config.json is {positions}; with fewer than "
            f"{_LEAST_CONTEXT} positions no token predicts another. Take it from the original "
            "config.json."
        )
    _check_heads(text)
    _check_embedding(text, weights)
    _check_experts(text, weights)


def _check_heads(text: PreTrainedConfig) -> None:
    heads, hidden = getattr(text, "num_attention_heads", 1), getattr(text, "hidden_size", 0)
    groups = getattr(text, "num_key_value_heads", None) or heads
    # Latent attention has head sizes of its own.
    own = ("head_dim", "kv_lora_rank", "qk_nope_head_dim")
    if hidden % heads and not any(getattr(text, name, None) for name in own):
        raise CheckpointError(
            f"hidden_size {hidden} in config.json can't be divided by num_attention_heads {heads}, "
            "and head_dim isn't given. Take them from the original config.json."
        )
    if groups < 1 or heads % groups:
        raise CheckpointError(
            f"num_attention_heads {heads} in config.json can't be divided by num_key_value_heads "
            f"{groups}. Take them from the original config.json."
        )


def _check_embedding(text: PreTrainedConfig, weights: StoredWeights) -> None:
    names = sorted((name for name in weights if _EMBEDDING.search(name)), key=len)
    if not names or not weights.holds_floats(names[0]) or len(weights.shapes[names[0]]) != 2:
        return
    for name, found in zip(("vocab_size", "hidden_size"), weights.shapes[names[0]], strict=True):
        asked = getattr(text, name, found)
        if name == "hidden_size" and getattr(text, "embedding_size", None):
            continue
        if asked != found:
            raise CheckpointError(
                f"{name} in config.json is {asked}, but {names[0]} has the shape "
                f"{list(weights.shapes[names[0]])}. {_TOGETHER}"
            )


def _check_experts(text: PreTrainedConfig, weights: StoredWeights) -> None:
    experts = _first(text, _EXPERTS)
    chosen = _first(text, _TOP_K)
    if experts is None:
        return
    found = 1 + max((int(m[1]) for name in weights if (m := _EXPERT.search(name))), default=-1)
    if found and experts[1] > found:
        raise CheckpointError(
            f"{experts[0]} in config.json is {experts[1]}, but the weights hold {found} experts "
            f"per layer. {_TOGETHER} Is the checkpoint complete?"
        )
    if chosen is not None and not 1 <= chosen[1] <= experts[1]:
        raise CheckpointError(
            f"{chosen[0]} in config.json is {chosen[1]}, but there are {experts[1]} experts "
            f"({experts[0]}): a token can have 1 to {experts[1]}. Take it from the original "
            "config.json."
        )


def _first(text: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, int] | None:
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return name, value
    return None
