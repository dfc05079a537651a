"""Settings that a checkpoint doesn't get to choose: what computes attention, what is returned."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FLAGS = {
    "use_cache": True,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}
"""Left by training: the artifact has a cache and gives logits, whatever they say."""

# What weights are no longer once they are read, and patches to transformers' own classes.
_DROPPED = {"quantization_config", "fusion_config"}


def pin_settings(config: PreTrainedConfig) -> None:
    """Let transformers choose its own kernels, and the model return logits and a cache.

    A configuration may name an ``attn_implementation`` of the form owner/name, for which
    transformers would download code from the hub and run it. Quantised weights are floats once
    they are read, so the configuration no longer says that they aren't.
    """
    for part in _parts(config):
        part._attn_implementation_internal = None
        part._experts_implementation_internal = None
        for name, value in _FLAGS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
        for name in _DROPPED & vars(part).keys():
            delattr(part, name)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a configuration and all within it."""
    found: list[PreTrainedConfig] = []
    left = [config]
    while left:
        part = left.pop()
        if any(part is other for other in found):
            continue
        found.append(part)
        left += [inner for inner in vars(part).values() if hasattr(inner, "get_text_config")]
    return found
