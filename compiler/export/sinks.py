"""Attention sinks as the standard operator knows no such thing: one more column of keys.

A sink is a score of its own in each head's softmax, which attends to nothing. So it is a column
whose key and value are zeros, with the sink as its mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "alloc_moe_sinks"


@contextlib.contextmanager
def sinks_as_columns(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with attention sinks attend by the standard operator inside the block."""
    if not any(isinstance(getattr(m, "sinks", None), torch.Tensor) for m in model.modules()):
        yield
        return
    AttentionInterface.register(IMPLEMENTATION, attend_with_sinks)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def attend_with_sinks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' attention with sinks does, in one call of the standard one.

    Args:
        module: The attention layer.
        query: [batch, heads, sequence, size].
        key: [batch, key/value heads, columns, size].
        value: As `key`, the size may be another.
        attention_mask: True where a token attends to a column [batch, 1, sequence, columns].
        s_aux: The sinks [heads]; None in layers without.
        options: What transformers gives its attention functions besides.
    """
    if s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    assert attention_mask is not None
    hidden = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    rows, sinks = query.shape[:-1], s_aux.to(query.dtype).reshape(1, -1, 1, 1)
    scores = torch.cat([hidden.expand(*rows, -1), sinks.expand(*rows, 1)], dim=-1)
    keys, values = (torch.nn.functional.pad(states, (0, 0, 0, 1)) for states in (key, value))
    return sdpa_attention_forward(module, query, keys, values, scores, **options)  # type: ignore[no-any-return]
