"""What deviates from the generic MoE layer: the one table of special cases.

A model needs no row here if its experts module follows transformers' fused layout
(`use_experts_implementation`) with a gate that `find_gate` finds, and if it exports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightTransform

_LLAMA4 = (
    "it routes each token to one expert, so there is nothing to allocate, and its rotary embedding "
    "uses complex numbers, which ONNX export doesn't support"
)

UNSUPPORTED: dict[str, str] = {
    "dbrx": (
        "transformers keeps the experts of its layers in one matrix, not in the fused layout "
        "(gate_up_proj and down_proj over all experts)"
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "minimax": (
        "its lightning attention keeps states in a way of its own, which isn't exported; "
        "MiniMax-M2 has none and works"
    ),
}
"""Model type -> why it can't be compiled, as the end of a sentence."""

# What these keep from call to call are keys and values of all tokens, or of a window of the last.
_CACHED = {"full_attention", "sliding_attention", "chunked_attention"}
# And these, states whose size doesn't depend on the number of tokens.
_STATES = {"conv", "linear_attention"}
_NOTHING = {"dummy"}

TEXT_PARTS = ("mistral3", "qwen3_vl_moe")
"""Models that also take images, whose text part transformers builds under another name."""

# Its text part is a Qwen3-MoE that always renormalises: of text alone the three positions that it
# rotates by are one.
_SAME_AS = {"qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True})}
_POSITIONS_OF_IMAGES = ("mrope_section", "mrope_interleaved")

_NEAR, _FAR = 0.125, 1e4  # within any limit, and beyond it
_DIGITS = 4  # of alpha and beta; a gate in float32 gives no more
_TOLERANCE = 1e-5

# u * u * sigmoid(alpha * u) is the square of u's positive part but for 1 / alpha^2.
_STEP = 1e6


def why_cache_is_unsupported(config: PreTrainedConfig) -> str:
    """Return why the runtimes can't carry a model's cache from call to call, "" if they can."""
    kinds = _layer_kinds(config)
    if others := sorted(kinds - _CACHED - _STATES - _NOTHING):
        return (
            f"its layers of type {' and '.join(others)} keep other states than keys and values "
            "from call to call, which the runtimes can't carry"
        )
    if kinds and kinds.isdisjoint(_CACHED):
        return (
            f"none of its layers ({' and '.join(sorted(kinds))}) keeps keys and values, by which "
            "transformers' exporter tells the steps of a text"
        )
    return ""


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the causal language model within one of `TEXT_PARTS`."""
    text = config.get_text_config(decoder=True)
    if text.model_type in _SAME_AS:
        model_type, more = _SAME_AS[text.model_type]
        settings = text.to_dict() | {"model_type": model_type} | more
        rotary = dict(settings["rope_parameters"])
        for name in _POSITIONS_OF_IMAGES:
            rotary.pop(name, None)
        text = AutoConfig.for_model(**settings | {"rope_parameters": rotary})
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def weight_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Return how a checkpoint's tensors become a model's, also if it is the text part of another's.

    In the words of `rename_source_key` of transformers, which applies them in this order.
    """
    renamed = (
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    )
    conversions: list[WeightTransform] = [WeightRenaming(*names) for names in renamed]
    for part, (model_type, _) in _SAME_AS.items():
        if model.config.model_type == model_type:
            conversions += get_checkpoint_conversion_mapping(part.removesuffix("_text")) or []
    conversions += get_model_conversion_mapping(model)
    return conversions


def latent_attention(model: PreTrainedModel) -> dict[str, Any]:
    """Return the layers of latent attention by name: they cache what they make keys of."""
    needed = ("expand_kv", "kv_b_proj", "qk_nope_head_dim", "v_head_dim")
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, part) for part in needed)
    }


def kinds_with_states(config: PreTrainedConfig) -> list[str]:
    """Return the types of a model's layers that keep states of a fixed size."""
    return sorted(_layer_kinds(config) & _STATES)


def _layer_kinds(config: PreTrainedConfig) -> set[str]:
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return {str(kind) for kind in kinds}


@dataclass(frozen=True)
class Gate:
    """How experts combine gate g and up u: ``g * sigmoid(alpha * g) * (u + beta)``.

    Before that g is cut at ``limit``, u at both ends; infinite where nothing is.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return what the experts' down projection gets."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def first_projection(experts: Any) -> str:
    """Return the name of the weight that an experts module of transformers multiplies first."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def expert_weights(experts: Any) -> tuple[str, str]:
    """Return the names of all weights of an experts module, biases aside."""
    return first_projection(experts), "down_proj"


def find_gate(experts: Any) -> Gate | None:
    """Return the gate that an experts module of transformers computes; None if it is another kind.

    Found by what it computes, not by what it is called. Experts without a gate that square the
    positive part of up have one as well: up itself, scaled until its sigmoid is a step.
    """
    if experts.has_post_expert_norm:
        return None
    try:
        return _fit_gate(experts) if experts.has_gate else _fit_square(experts)
    except (RuntimeError, TypeError, AttributeError, IndexError):  # it takes other arguments
        return None


def _fit_gate(experts: Any) -> Gate | None:
    at_zero, near, far = _apply(experts, [_NEAR] * 3, [0.0, _NEAR, _FAR]).tolist()
    slope = (near - at_zero) / _NEAR  # in up
    half = slope / _NEAR  # sigmoid(alpha * gate)
    if not 0 < half < 1:
        return None
    beta = round(at_zero / slope, _DIGITS)
    alpha = round(math.log(half / (1 - half)) / _NEAR, _DIGITS)
    most = far / slope - beta
    found = Gate(alpha, beta, math.inf if most > _FAR / 2 else round(most, _DIGITS))
    values = torch.tensor([-_FAR, *torch.linspace(-12, 12, 49).tolist(), _FAR], dtype=torch.float64)
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    expected, actual = found(gate, up), _apply(experts, gate.tolist(), up.tolist())
    agree = torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return found if agree else None


def _fit_square(experts: Any) -> Gate | None:
    up = torch.linspace(-12, 12, 49, dtype=torch.float64)
    found = Gate(_STEP)
    with torch.inference_mode():
        agree = torch.allclose(experts.act_fn(up), found(up, up), rtol=_TOLERANCE, atol=_TOLERANCE)
    return found if agree else None


def _apply(experts: Any, gate: list[float], up: list[float]) -> torch.Tensor:
    halves = torch.tensor([gate, up], dtype=torch.float64)
    joined = halves.flatten() if experts.is_concatenated else halves.T.flatten()
    with torch.inference_mode():
        gated: torch.Tensor = experts._apply_gate(joined[None])
    return gated[0].double()
