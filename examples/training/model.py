"""The architectures of the tiny example models, and what makes them train fast on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEQUENCE_LENGTH = 512

_SHARED: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    # 0.02 suits a width of 2048; a narrow model needs larger weights for the same activations.
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES = {
    "olmoe": (
        OlmoeConfig,
        {"intermediate_size": 64, "num_hidden_layers": 6, "norm_topk_prob": False},
    ),
    # Its router renormalises: the weights of a token's experts add up to one.
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "moe_intermediate_size": 64,
            "num_hidden_layers": 5,
            "norm_topk_prob": True,
            "head_dim": 32,
            "num_key_value_heads": 2,
        },
    ),
    # Few experts per token, and a shared one of the width of two.
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 24,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "num_hidden_layers": 6,
            "norm_topk_prob": False,
            "num_key_value_heads": 2,
        },
    ),
}


def build_model(vocab_size: int, family: str = "olmoe") -> PreTrainedModel:
    """Return an untrained model in float32, with experts that are fast to train on a CPU."""
    config_class, own = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(
        config_class(vocab_size=vocab_size, **{**_SHARED, **own}), dtype=torch.float32
    )
    ALL_EXPERTS_FUNCTIONS.register("looped", looped_experts)
    model.set_experts_implementation("looped")
    return model


def looped_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts one after the other on the tokens sorted by expert.

    Equal to the implementations of transformers, and faster than each of them on a CPU: the
    gradient of ``weights[expert]`` is a full-size tensor per expert, that of ``unbind`` is not.
    """
    experts_per_token = top_k_index.shape[-1]
    flat_index = top_k_index.reshape(-1)
    order = torch.argsort(flat_index)
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    counts = torch.bincount(flat_index, minlength=len(down)).tolist()
    token = order // experts_per_token
    parts = []
    for states, gate_up_proj, down_proj in zip(
        hidden_states[token].split(counts),
        gate_up.unbind(0),
        down.unbind(0),
        strict=True,
    ):
        gate, up = functional.linear(states, gate_up_proj).chunk(2, dim=-1)
        parts.append(functional.linear(functional.silu(gate) * up, down_proj))
    weighted = torch.cat(parts) * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add(0, token, weighted)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of a linear head, called with hidden states, head weights and labels.

    The logits are by far the largest tensor of a step. The gradient overwrites them while they are
    at hand, which spares the passes over memory that autograd would need.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        hidden, weight, labels = inputs
        target = labels[:, None]
        logits = hidden @ weight.T  # [tokens, vocabulary]
        log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
        loss = (log_sum - logits.gather(1, target)).mean()
        grad = logits.sub_(log_sum).exp_().div_(len(hidden))
        grad.scatter_add_(1, target, torch.full(target.shape, -1 / len(hidden)))
        ctx.save_for_backward(grad @ weight, grad.T @ hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None


def load_balancing_loss(router_logits: tuple[Tensor, ...], experts_per_token: int) -> Tensor:
    """Return the load-balancing loss of the Switch Transformer, averaged over layers.

    The one in transformers adds up the layers first, so one layer may make up for another. Equal
    use of all experts gives experts_per_token, the least possible when probabilities follow use.
    """
    losses = []
    for logits in router_logits:  # [tokens, experts]
        num_experts = logits.shape[-1]
        probabilities = logits.softmax(dim=-1)
        chosen = logits.topk(experts_per_token, dim=-1).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=num_experts)
        losses.append(num_experts * (probabilities.mean(0) * counts / len(logits)).sum())
    return torch.stack(losses).mean()
