"""Model without weights -> its MoE layers, or why it has none that can be compiled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from alloc_moe.compiler.errors import UnsupportedModelError
from alloc_moe.compiler.model import architectures
from alloc_moe.compiler.model.skeleton import experts_modules, probe_experts_per_token
from alloc_moe.compiler.records import MoeLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_moe_layers(model: PreTrainedModel) -> tuple[MoeLayer, ...]:
    """Return the MoE layers in the order in which tokens pass them.

    Raises:
        UnsupportedModelError: There are none, or their experts can't be lowered.
    """
    experts = experts_modules(model)
    if not experts:
        raise UnsupportedModelError(_why_no_experts(model))
    for name, module in experts.items():
        _check_experts(model, name, module)
    per_token = probe_experts_per_token(model)
    layers = tuple(
        MoeLayer(
            name=name.rpartition(".")[0],
            experts_name=name,
            decoder_layer=_decoder_index(name),
            num_experts=module.get_parameter("down_proj").shape[0],
            experts_per_token=per_token[name],
        )
        for name, module in experts.items()
        if name in per_token
    )
    if all(layer.experts_per_token == 1 for layer in layers):
        raise UnsupportedModelError(
            f"Every token activates 1 expert per layer in {model.config.model_type}, "
            "so there is nothing to allocate."
        )
    return layers


def _why_no_experts(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    suspects = sorted(
        {
            type(m).__name__
            for m in model.modules()
            if re.search("expert|moe", type(m).__name__, re.I)
        }
    )
    if suspects:
        return (
            f"The experts of {kind} ({', '.join(suspects[:3])}) don't follow the fused layout of "
            "transformers 5 (gate_up_proj and down_proj over all experts), so they can't be found. "
            "Supported are OLMoE, Qwen2/3-MoE, Mixtral, DeepSeek-V2/V3 and their kin."
        )
    return (
        f"{kind} is a dense model: it has no routed experts, so there is nothing to allocate. "
        "Give a Mixture-of-Experts checkpoint."
    )


def _check_experts(model: PreTrainedModel, name: str, module: Any) -> None:
    if architectures.find_gate(module) is None:
        gate = "" if module.has_gate else " without a gate"
        raise UnsupportedModelError(
            f"{model.config.model_type}'s experts ({name}) compute "
            f"{getattr(module, 'act_fn', type(module).__name__)}{gate}; onnxruntime's MoE operator "
            "computes experts gated by SiLU, scaled and clamped or not, or ungated ones with a "
            "squared ReLU, and no others."
        )


def _decoder_index(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    if match is None:
        raise UnsupportedModelError(
            f"The experts module {name} is in no numbered decoder layer, so its place is unknown."
        )
    return int(match[1])
