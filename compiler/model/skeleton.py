"""A model's structure without its weights: what export traces, and where MoE layers are found."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alloc_moe.compiler.errors import UnsupportedModelError

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


def causal_class(config: PreTrainedConfig) -> Any:
    """Return what builds the causal language model of `config`; None where that takes images too.

    transformers lists some language models among those that take images only: Mistral 4.
    """
    listed = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if listed is None or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if listed.__name__.endswith("ForCausalLM") else None


def build_empty(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of `config` with parameters on the meta device, and real buffers."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = causal_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    forget_earlier_lengths(model)
    return model


def forget_earlier_lengths(model: PreTrainedModel) -> None:
    """Let dynamic rotary embeddings depend on the positions they are given, on nothing else.

    transformers' remember the longest text so far, which is no function that a graph could be.
    For a text and its continuation both give the same.

    Raises:
        UnsupportedModelError: They differ by layer.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict) and "dynamic" in kinds.values():
            raise UnsupportedModelError(
                f"{model.config.model_type} has rotary embeddings of type dynamic in some layers, "
                "which isn't lowered."
            )
        if kinds == "dynamic":
            module.forward = functools.partial(_rotate_by_length, module)


def _rotate_by_length(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    length, longest = position_ids.max() + 1, module.original_max_seq_len
    scaled, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        module.config, x.device, seq_len=length.clamp(min=longest)
    )
    frequencies = torch.where(length > longest, scaled, module.original_inv_freq.to(x.device))
    rotate = inspect.unwrap(type(module).forward)
    return rotate(_WithFrequencies(module, frequencies), x, position_ids)  # type: ignore[no-any-return]


class _WithFrequencies:
    """Stands for a module whose frequencies are others; writing to its own would be exported."""

    def __init__(self, module: torch.nn.Module, inv_freq: torch.Tensor) -> None:
        self._module = module
        self.inv_freq = inv_freq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


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
