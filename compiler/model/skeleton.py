"""A model's structure without its weights: what export traces, and where MoE layers are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PROBE = "alloc_moe_probe"


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of `config` with zero weights that take no memory.

    Every parameter is one zero, expanded to its shape: unlike a meta tensor it is on the CPU, so
    the model runs and exports as any other. Buffers hold their real values.
    """
    model = build_empty(config, dtype, trust_remote_code=trust_remote_code)
    replaced: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        zero = torch.nn.Parameter(
            torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False
        )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, replaced.setdefault(id(parameter), zero))
    model.tie_weights()
    skeleton: PreTrainedModel = model.eval()
    return skeleton


def build_empty(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of `config` with parameters on the meta device, and real buffers."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def parameter_names(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Return the names of each parameter: several where modules share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values()]


def experts_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return name -> module of everything that transformers runs as fused routed experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_concatenated")
    }


def probe_experts_per_token(model: PreTrainedModel) -> dict[str, int]:
    """Return experts module name -> experts per token, as the router really hands them over.

    Found by running two tokens, since every architecture names the number differently.
    """
    names = {id(module): name for name, module in experts_modules(model).items()}
    found: dict[str, int] = {}

    def probe(
        self: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        found[names[id(self)]] = ids.shape[-1]
        return torch.zeros_like(hidden)

    with experts_function(model, _PROBE, probe), torch.inference_mode():
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    return found


@contextlib.contextmanager
def experts_function(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    """Run the model's experts through `function(module, hidden, ids, weights)` inside the block."""
    previous = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(name, function)
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(previous)
